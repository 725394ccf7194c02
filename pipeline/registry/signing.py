"""Signatures of versions: OpenSSF model signing with a plain elliptic-curve key, offline.

A signature covers every file of a version, among them the bill of materials, which names the model.
So neither who can write to the bucket nor who can write to the registry can change a file, or give
one model's files to another, without notice. An earlier signed version of the same model passes.

Keys are files of this machine that environment variables name. They are in no configuration.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.registry.bom import BOM_FILE

if TYPE_CHECKING:
    from model_signing import hashing, signing, verifying

SIGNATURE_FILE = "model.sig"
SIGNING_KEY = "VLAE_SIGNING_KEY"
"""The environment variable of the private key's path. New versions are signed if it is set."""
VERIFYING_KEY = "VLAE_VERIFYING_KEY"
"""The environment variable of the public key's path. Versions are verified if it is set."""


def signs() -> bool:
    """Whether new versions are signed."""
    return bool(os.environ.get(SIGNING_KEY))


def verifies() -> bool:
    """Whether versions have to be signed to be read."""
    return bool(os.environ.get(VERIFYING_KEY))


def check() -> None:
    """Raise UserError unless the keys that the environment names can be used."""
    if signs():
        _signer()
    if verifies():
        _verifier()


def sign(folder: Path) -> None:
    """Write the signature of all files in ``folder`` beside them, if there is a signing key."""
    if signs():
        _signer().sign(folder, folder / SIGNATURE_FILE)


def verify(folder: Path, name: str) -> None:
    """Raise UserError unless the files in ``folder`` were signed as a version of ``name``.

    Nothing is checked if there is no key to verify with.
    """
    if not verifies():
        return
    if not (folder / SIGNATURE_FILE).is_file():
        raise UserError(f"it is not signed, and {VERIFYING_KEY} demands a signature")
    verifier = _verifier()
    try:
        verifier.verify(folder, folder / SIGNATURE_FILE)
        bom = json.loads((folder / BOM_FILE).read_bytes())
        signed = str(bom["metadata"]["component"]["name"])
    except Exception as error:  # whatever a forged signature makes the parsers raise
        raise UserError(
            f"{SIGNATURE_FILE} is no signature of these files by the key that {VERIFYING_KEY}"
            f" names: {_reason(error)}"
        ) from error
    if signed != name:
        raise UserError(f"its files were signed as a version of {signed!r}")


def _signer() -> "signing.Config":
    with _usable(SIGNING_KEY) as key:
        from model_signing import signing

        signer = signing.Config().use_elliptic_key_signer(private_key=key)
        return signer.set_hashing_config(_hashed())


def _verifier() -> "verifying.Config":
    with _usable(VERIFYING_KEY) as key:
        from model_signing import verifying

        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
        return verifier.set_hashing_config(_hashed())


def _hashed() -> "hashing.Config":
    """Every file but the signature, each by its sha256."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _reason(error: Exception) -> str:
    """One line that says what does not fit; of the library's account of files, their names."""
    said = str(error).replace("\\", "")
    found = [f"{file} was changed" for file in re.findall(r"Hash mismatch for '([^']+)'", said)]
    for kind, names in re.findall(r"(Extra|Missing) files [^:]*: ([^\]\"']+)", said):
        found.append(f"{names} {'was added' if kind == 'Extra' else 'is missing'}")
    return "; ".join(found) or " ".join(said.split()) or f"it is damaged ({type(error).__name__})"


@contextmanager
def _usable(variable: str) -> Iterator[Path]:
    """The key that ``variable`` names. Errors of what reads it become UserErrors."""
    path = Path(os.environ[variable]).expanduser()
    try:
        yield path
    except ImportError as error:
        raise UserError(
            f"{variable} is set, but {error.name} is not installed: pip install"
            " 'vlae-pipeline[signing]'"
        ) from error
    except OSError as error:
        raise UserError(f"{variable}={path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{variable}={path} is not a usable key: it takes a PEM file without a password, of the"
            " curve P-256, P-384 or P-521, as `openssl ecparam -name prime256v1 -genkey -noout`"
            " makes it; for verifying, its public half"
        ) from error
