"""Versions whose files were changed with access to the bucket, to the registry, or to both.

With a key configured, versions are signed when they are registered, and one that the key did not
sign as it stands is not read.
"""

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline import commands
from pipeline.commands.models.registry import COMMAND
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.errors import UserError
from pipeline.registry.models import open_model
from pipeline.registry.signing import SIGNATURE_FILE, SIGNING_KEY, VERIFYING_KEY
from pipeline.registry.versions import CHECKSUM, Registry
from pipeline.runs import sha256_of_file
from pipeline.storage.folder import FolderStorage
from tests.pipeline.models import prepare_run


def write_key(folder: Path, name: str) -> tuple[Path, Path]:
    """A new private key and its public half, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_key(tmp_path_factory.mktemp("keys"), "mine")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> RegistryOptions:
    """Versions 1 and 2 of ``model``, version 1 of ``other``, signed; ``plain`` is not signed."""
    place = tmp_path_factory.mktemp("registry")
    options = RegistryOptions(f"sqlite:///{place}/registry.db", str(place / "artifacts"))
    runs = [prepare_run(FolderStorage(place / "store"), seed) for seed in range(3)]
    registry = Registry(options)
    registry.register("plain", runs[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SIGNING_KEY, str(keys[0]))
        for name, run in zip(("model", "model", "other"), runs, strict=True):
            registry.register(name, run)
    return options


@pytest.fixture
def registry(
    options: RegistryOptions, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Registry:
    monkeypatch.setenv(VERIFYING_KEY, str(keys[1]))
    return Registry(options)


class Changed:
    """A version's folder, of which changes are undone."""

    def __init__(self, registry: Registry, name: str, version: int) -> None:
        self.client, self.name, self.version = registry.client, name, str(version)
        self.folder = Path(self.client.get_model_version_download_uri(name, self.version))
        self.files = {path: path.read_bytes() for path in self.folder.iterdir()}
        self.tags = dict(self.client.get_model_version(name, self.version).tags)

    def write(self, file: str, content: bytes, register: bool) -> None:
        """Replace a file, and with ``register`` also its checksum in the registry."""
        (self.folder / file).write_bytes(content)
        if register:
            self.client.set_model_version_tag(
                self.name, self.version, CHECKSUM + file, sha256_of_file(self.folder / file)
            )

    def undo(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        for path, content in self.files.items():
            path.write_bytes(content)
        for key in self.client.get_model_version(self.name, self.version).tags:
            if key not in self.tags:
                self.client.delete_model_version_tag(self.name, self.version, key)
        for key, value in self.tags.items():
            self.client.set_model_version_tag(self.name, self.version, key, value)


@pytest.fixture
def change(request: pytest.FixtureRequest, registry: Registry) -> Callable[[str, int], Changed]:
    def of(name: str, version: int) -> Changed:
        changed = Changed(registry, name, version)
        request.addfinalizer(changed.undo)
        return changed

    return of


def refusal(registry: Registry, name: str, version: int) -> str:
    """The sentence with which a version is not opened; the check of its files names it, too."""
    reference = f"models:/{name}/{version}"
    with pytest.raises(UserError) as raised:
        open_model(reference, registry.config, StorageOptions())
    assert str(raised.value) in registry.verify(name, version).problems
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_signed_version_is_opened_and_found_whole(registry: Registry) -> None:
    opened = open_model("models:/model/2", registry.config, StorageOptions())
    assert opened.version == ("model", 2)
    found = registry.verify("model", 2)
    assert (found.signed, found.checked, found.problems) == (True, True, [])
    assert {SIGNATURE_FILE, "model.safetensors", "bom.json"} <= found.files.keys()


@pytest.mark.parametrize("file", ["model.safetensors", "training.json", "samples.png", "bom.json"])
def test_a_file_replaced_in_bucket_and_registry_is_refused_by_name(
    registry: Registry, change: Callable[[str, int], Changed], file: str
) -> None:
    changed = change("model", 1)
    changed.write(file, changed.files[changed.folder / file] + b" ", register=True)
    assert f"{file} was changed" in refusal(registry, "model", 1)


def test_a_file_more_or_less_is_refused(
    registry: Registry, change: Callable[[str, int], Changed]
) -> None:
    changed = change("model", 1)
    changed.write("more.py", b"import os", register=True)
    assert "more.py was added" in refusal(registry, "model", 1)
    changed.undo()
    (changed.folder / "samples.png").unlink()
    registry.client.delete_model_version_tag("model", "1", f"{CHECKSUM}samples.png")
    assert "samples.png is missing" in refusal(registry, "model", 1)


def test_a_version_without_signature_is_refused_and_so_is_anothers_key(
    registry: Registry,
    change: Callable[[str, int], Changed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "not signed" in refusal(registry, "plain", 1)
    changed = change("model", 1)
    (changed.folder / SIGNATURE_FILE).unlink()
    registry.client.delete_model_version_tag("model", "1", CHECKSUM + SIGNATURE_FILE)
    assert "not signed" in refusal(registry, "model", 1)
    monkeypatch.setenv(VERIFYING_KEY, str(write_key(tmp_path, "other")[1]))
    assert "no signature of these files" in refusal(registry, "model", 2)


def test_signed_files_of_one_model_are_not_accepted_as_another(
    registry: Registry, change: Callable[[str, int], Changed]
) -> None:
    other = Path(registry.client.get_model_version_download_uri("other", "1"))
    changed = change("model", 1)
    for path in other.iterdir():
        changed.write(path.name, path.read_bytes(), register=True)
    assert "signed as a version of 'other'" in refusal(registry, "model", 1)


def forged(signature: bytes, **envelope: object) -> bytes:
    bundle = json.loads(signature)
    bundle["dsseEnvelope"] |= envelope
    return json.dumps(bundle).encode()


@pytest.mark.parametrize(
    "forge",
    [
        lambda kept: b"",
        lambda kept: b"{}",
        lambda kept: b"[" * 200_000,
        lambda kept: b"\xff\xfe",
        lambda kept: kept[:-40],
        lambda kept: forged(kept, payload=base64.b64encode(b"{}").decode()),
        lambda kept: forged(kept, signatures=[]),
        lambda kept: forged(kept, signatures=[{"sig": "AAAA"}]),
        lambda kept: forged(kept, payloadType=3),
    ],
    ids=["empty", "object", "deep", "bytes", "cut", "payload", "unsigned", "zeros", "type"],
)
def test_a_forged_signature_ends_in_a_sentence(
    registry: Registry, change: Callable[[str, int], Changed], forge: Callable[[bytes], bytes]
) -> None:
    changed = change("model", 1)
    changed.write(
        SIGNATURE_FILE, forge(changed.files[changed.folder / SIGNATURE_FILE]), register=True
    )
    assert "no signature of these files" in refusal(registry, "model", 1)


def test_the_command_names_the_damaged_file_and_fails(
    registry: Registry, change: Callable[[str, int], Changed], tmp_path: Path
) -> None:
    def verify() -> subprocess.CompletedProcess[str]:
        words = ["registry", "verify", "name=model", f"registry.uri={registry.config.uri}"]
        words += [f"registry.artifacts={registry.config.artifacts}"]
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = verify()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("signature valid") == 2
    changed = change("model", 1)
    changed.write("training.json", b"{}", register=False)
    done = verify()
    assert done.returncode == 2
    assert "training.json is damaged or was replaced" in done.stderr
    assert "model version 2: " in done.stdout
    assert "Traceback" not in done.stderr


def test_without_a_key_checksums_alone_are_checked_and_the_command_says_so(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VERIFYING_KEY)
    found = registry.verify("model", 1)
    assert (found.signed, found.checked, found.problems) == (True, False, [])
    result = {"name": "model", "verified": [found.to_json()]}
    config = commands.load("registry", ["action=verify", "name=model"])
    assert "not checked" in COMMAND.format(config, result)


def test_a_run_registered_without_a_key_is_registered_again_with_one(
    options: RegistryOptions, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(FolderStorage(Path(options.artifacts).parent / "more"), 7)
    registry = Registry(options)
    assert registry.register("late", run) == 1
    monkeypatch.setenv(SIGNING_KEY, str(keys[0]))
    assert registry.register("late", run) == 2
    assert registry.register("late", run) == 2
    assert registry.verify("late", 2).signed
    monkeypatch.delenv(SIGNING_KEY)
    assert registry.register("late", run) == 1


@pytest.mark.parametrize("variable", [SIGNING_KEY, VERIFYING_KEY])
def test_a_key_that_cannot_be_used_is_named_before_anything_is_done(
    options: RegistryOptions,
    keys: tuple[Path, Path],
    tmp_path: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text").write_text("secret")
    wrong = keys[1] if variable == SIGNING_KEY else keys[0]
    for path in (tmp_path / "absent", tmp_path, tmp_path / "text", wrong):
        monkeypatch.setenv(variable, str(path))
        with pytest.raises(UserError, match=f"{variable}={path}") as raised:
            Registry(options)
        assert "secret" not in str(raised.value)


def test_no_key_lies_in_a_version(registry: Registry, keys: tuple[Path, Path]) -> None:
    folder = Path(registry.client.get_model_version_download_uri("model", "1"))
    tags = json.dumps(registry.client.get_model_version("model", "1").tags)
    for text in (*(path.read_bytes().decode("latin1") for path in folder.iterdir()), tags):
        assert "PRIVATE KEY" not in text
        assert str(keys[0]) not in text
