"""``vlae registry`` on trained models and a real MLflow.

Registered models load without Ray and without executing anything.
"""

import hashlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import vlae
from pipeline import cli
from pipeline.config import sections
from pipeline.errors import UserError
from pipeline.registry.models import open_model
from pipeline.registry.tracking import TrackedRun, training_run
from pipeline.registry.versions import Registry
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.pipeline import strokes
from tests.pipeline.models import prepare_run

Command = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with a data set, a run that was trained briefly, and one trained longer."""
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    for name, images in (("little", 80), ("more", 2400)):
        loop.fit(
            strokes.train_config(
                root, f"name={name}", f"train.images={images}", "train.valid_every=4000"
            )
        )
    return root


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('database') / 'registry.db'}"


@pytest.fixture
def command(root: str, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``vlae registry``; returns its output, or its error, and its result."""

    def command(*words: str, code: int = 0) -> tuple[str, dict[str, Any]]:
        options = [
            f"storage.root={root}",
            f"registry.uri={uri}",
            "registry.pyfunc=true",
            f"output={tmp_path}",
            "bounds.samples=4",
            "bounds.pictures=5",
        ]
        with pytest.raises(SystemExit) as ended:
            cli.main(["registry", *words, *options])
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        if code:
            return printed.err.splitlines()[-1], {}
        return printed.out, json.loads((tmp_path / "result.json").read_text())

    return command


@pytest.fixture
def registered(command: Command, root: str, request: pytest.FixtureRequest) -> str:
    """A model of the test's own: version 1 was trained briefly, version 2 longer."""
    name = request.node.name[:60]
    command("register", f"name={name}", f"runs=[{root}/runs/little,{root}/runs/more]")
    return name


def aliases(command: Command, name: str) -> dict[str, int]:
    _, result = command("list")
    return {
        alias: int(version)
        for row in result["models"]
        if row["name"] == name
        for alias, version in row["aliases"].items()
    }


def test_registering_evaluates_runs_and_makes_versions_in_their_order(
    command: Command, root: str, registered: str
) -> None:
    printed, result = command("show", f"name={registered}")
    newest, first = result["versions"]
    assert (newest["run"], first["run"]) == (f"{root}/runs/more", f"{root}/runs/little")
    assert (newest["aliases"], first["aliases"]) == (["challenger"], ["champion"])
    for row in (newest, first):
        evaluation = open_storage(row["run"]).read_json("evaluation/result.json")
        assert row["metrics"]["valid/iwae_nats"] == evaluation["valid"]["iwae_nats"]
        assert row["metrics"]["valid/iwae_nats_se"] == evaluation["valid"]["iwae_nats_se"]
        assert f"code length {evaluation['valid']['elbo_nats']:.2f} +- " in printed
    again, _ = command("register", f"name={registered}", f"runs=[{root}/runs/little]")
    assert again.startswith(f"{registered} version 1: {root}/runs/little\n")
    assert len(command("show", f"name={registered}")[1]["versions"]) == 2


def test_models_are_compared_image_by_image(command: Command, root: str, registered: str) -> None:
    printed, result = command("compare", f"name={registered}")
    comparison = result["comparison"]
    assert (
        comparison["version"],
        comparison["other"],
        comparison["num_images"],
        comparison["better"],
    ) == (2, 1, 20, True)
    assert "version 2 is better" in printed
    evaluations = [
        open_storage(f"{root}/runs/{run}").read_json("evaluation/result.json")["valid"]
        for run in ("more", "little")
    ]
    for name, key in (("nll", "iwae"), ("code_length", "elbo"), ("rate", "rate")):
        row = comparison["nats"][name]
        for part, figures in zip(("version", "other"), evaluations, strict=True):
            assert row[part] == pytest.approx(figures[f"{key}_nats"], rel=1e-5)
            assert row[f"{part}_se"] == pytest.approx(figures[f"{key}_nats_se"], rel=1e-4)
        assert row["difference"] == pytest.approx(row["version"] - row["other"])
    # Both models find the same images hard, so the error of the difference is smaller than that of
    # independent measurements.
    row = comparison["nats"]["nll"]
    assert row["difference_se"] < np.hypot(row["version_se"], row["other_se"])
    _, turned = command("compare", f"name={registered}", "version=1", "against=2")
    assert turned["comparison"]["nats"]["nll"]["difference"] == pytest.approx(-row["difference"])
    assert turned["comparison"]["better"] is False
    itself = command("compare", f"name={registered}", "version=1", "against=1")[1]["comparison"]
    assert itself["nats"]["nll"]["difference"] == itself["nats"]["nll"]["difference_se"] == 0


def test_only_a_better_model_is_promoted_without_yes_and_promotions_are_rolled_back(
    command: Command, registered: str
) -> None:
    printed, result = command("promote", f"name={registered}")
    assert printed.splitlines()[-2] == f"{registered} version 2 is now champion"
    assert result["comparison"]["better"]
    assert aliases(command, registered) == {"champion": 2}

    error, _ = command("promote", f"name={registered}", "version=1", code=2)
    assert (
        error
        == f"error: version 1 of {registered} is not better than the champion, version 2: nothing"
        " was changed; to promote it anyway, add --yes"
    )
    assert aliases(command, registered) == {"champion": 2}
    for word in ("--yes", "yes=true"):
        command("promote", f"name={registered}", "version=1", word)
        assert aliases(command, registered) == {"champion": 1}
        printed, _ = command("rollback", f"name={registered}")
        assert printed.startswith(
            f"{registered} version 2 is champion again, in place of version 1\n"
        )
        assert aliases(command, registered) == {"champion": 2}
    command("rollback", f"name={registered}")
    assert aliases(command, registered) == {"champion": 1}
    error, _ = command("rollback", f"name={registered}", code=2)
    assert "has had no champion before" in error
    printed, result = command("show", f"name={registered}")
    events = [(how, version) for _, how, version in result["champions"]]
    back = [("rolled back", 2), ("promoted", 1), ("rolled back", 2), ("rolled back", 1)]
    assert events == [("promoted", 1), ("promoted", 2), ("promoted", 1), *back]
    assert "champions: promoted 1 on " in printed


def searched(uri: str, root: str, *versions: tuple[str, float, list[str] | None]) -> str:
    """Register runs of one model, each with an invented rate in bits and the constraints of its
    search; returns the model's name.
    """
    options = sections.RegistryOptions(uri=uri, artifacts=f"{root}/registry")
    registry, name = Registry(options), f"searched-{len(Path(root).parts)}-{Path(root).name}"
    for run_name, rate, constraints in versions:
        run = prepare_run(open_storage(root).child(run_name), 0, rate_bits=rate)
        training = run.storage.read_json("model/training.json")
        parent = None
        if constraints is not None:
            parameters = {"search.constraints": constraints}
            folder = open_storage(root).child(f"searches/{run_name}")
            parent = TrackedRun(folder, f"of-{run_name}", "mnist", parameters)
        registry.connection.sync(
            training_run(run, training["config"], training["manifest"], parent)
        )
        registry.register(name, run)
    return name


@pytest.mark.parametrize(
    ("champion", "challenger", "said"),
    [
        (["rate_bits >= 8"], ["rate_bits >= 8", "nll <= 60"], "nll is 88.00, not nll <= 60"),
        (["rate_bits >= 3"], ["4 <= rate_bits <= 5"], "rate_bits is 12.2, not 4 <= rate_bits <= 5"),
        (["rate_bits <= 5"], None, "rate_bits is 12.2, not rate_bits <= 5"),
        (["rate_bits <= 5"], [], None),
        (None, None, None),
        (None, ["rate_bits >= 8", "probe_accuracy >= 0.9"], None),
    ],
)
def test_a_version_that_breaks_its_searchs_constraints_is_promoted_only_with_yes(
    champion: list[str] | None,
    challenger: list[str] | None,
    said: str | None,
    command: Command,
    root: str,
    uri: str,
    tmp_path: Path,
) -> None:
    """A version of no search is held to the constraints of the champion's."""
    promote = ["promote", "version=2", f"dataset_url={root}/datasets/strokes"]
    name = searched(uri, str(tmp_path), ("a", 4.0, champion), ("b", 12.25, challenger))
    error, _ = command(*promote, f"name={name}", code=2)
    if said:
        asking = "b" if challenger else "a"
        assert (
            error == f"error: version 2 of {name} breaks a constraint: its {said}, as search"
            f" of-{asking} asks: nothing was changed; to promote it anyway, add --yes"
        )
    else:
        assert "is not better than the champion" in error
    assert aliases(command, name) == {"champion": 1, "challenger": 2}
    printed, _ = command(*promote, f"name={name}", "--yes")
    assert aliases(command, name) == {"champion": 2}
    assert (f"although its {said}" in printed) == (said is not None)
    assert "although" not in command(*promote, f"name={name}")[0], "it is champion already"


def test_other_aliases_need_no_comparison(command: Command, registered: str) -> None:
    _, result = command("promote", f"name={registered}", "version=1", "alias=blessed")
    assert result["comparison"] is None
    assert aliases(command, registered) == {"champion": 1, "challenger": 2, "blessed": 1}


def test_missing_and_incomparable_models_are_rejected(
    command: Command, root: str, registered: str
) -> None:
    for words, said in (
        (["compare"], "give name=NAME"),
        (
            ["compare", f"name={registered}", "version=7"],
            f"models:/{registered}/7 is not in the registry",
        ),
        (
            ["compare", f"name={registered}", "against=nobody"],
            f"models:/{registered}@nobody is not in the registry",
        ),
        (
            ["compare", f"name={registered}", "split=train", f"dataset_url={root}/datasets/none"],
            "datasets/none",
        ),
        (["register", f"name={registered}"], "give runs="),
        (
            ["register", f"name={registered}", f"runs=[{root}/runs/none]"],
            f"{root}/runs/none holds no finished model",
        ),
        (["promote", "name=absent"], "holds no model named absent"),
    ):
        error, _ = command(*words, code=2)
        assert said in error


# --- using what is registered ---------------------------------------------------------------------


USE = """
import sys
sys.modules["ray"] = None  # importing it fails
import numpy, pathlib, torch
images, uri, name, folder = sys.argv[1:]

import mlflow.artifacts, vlae
mlflow.set_tracking_uri(uri)
model = vlae.load(mlflow.artifacts.download_artifacts(f"models:/{name}@champion"))

assert "pipeline" not in sys.modules
import mlflow.pyfunc

def watch(event, arguments):
    assert event != "pickle.find_class", arguments
    assert event != "compile" or "/models/m-" not in str(arguments[1]), arguments
sys.addaudithook(watch)
loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
x = numpy.load(images)
with torch.no_grad():
    code = model.encoder(torch.from_numpy(x)).code.numpy()
numpy.testing.assert_array_equal(loaded.predict(x), code)
assert "pipeline" not in sys.modules
numpy.save(folder + "/code.npy", code)
"""


def test_three_lines_of_plain_python_and_pyfunc_load_a_version_without_ray_or_pickle(
    registered: str, root: str, uri: str, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 2, (6, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    arguments = [str(tmp_path / "images.npy"), uri, registered, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", USE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = vlae.load(f"{root}/runs/little/model").encoder(torch.from_numpy(images)).code
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "code.npy")), expected)


@pytest.mark.parametrize("source", ["registry", "run"])
def test_samples_and_reconstructions_are_drawn_from_a_version_or_a_run(
    source: str, registered: str, root: str, uri: str, tmp_path: Path
) -> None:
    model = f"models:/{registered}@champion" if source == "registry" else f"{root}/runs/little"
    drawn = []
    for number in range(2):
        for name in ("sample", "reconstruct"):
            output = tmp_path / f"{name}-{number}"
            options = [
                f"model={model}",
                f"storage.root={root}",
                f"registry.uri={uri}",
                "num_images=6",
                f"output={output}",
            ]
            with pytest.raises(SystemExit) as ended:
                cli.main([name, *options])
            assert ended.value.code == 0
            (picture,) = json.loads((output / "result.json").read_text())["pictures"]
            drawn.append(Path(picture).read_bytes())
            assert drawn[-1].startswith(b"\x89PNG")
    assert drawn[:2] == drawn[2:]


# --- attacks --------------------------------------------------------------------------------------


class Exploit:
    """Executes code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))


ATTACKS = {
    "a pickle for the weights": (
        "model.safetensors",
        lambda content, mark: pickle.dumps(Exploit(mark)),
    ),
    "weights of another shape": (
        "model.safetensors",
        lambda content, mark: save({"weight": torch.zeros(3)}),
    ),
    "a pickle for the arguments": ("model.json", lambda content, mark: pickle.dumps(Exploit(mark))),
    "a path outside": (
        "model.json",
        lambda content, mark: json.dumps(json.loads(content) | {"window": "../../../etc"}).encode(),
    ),
    "an unknown argument": (
        "model.json",
        lambda content, mark: json.dumps(json.loads(content) | {"_target_": "os.system"}).encode(),
    ),
    "a huge size": (
        "model.json",
        lambda content, mark: json.dumps(json.loads(content) | {"flow_hidden": 1 << 40}).encode(),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_replaced_file_of_a_version_is_rejected_by_name(
    attack: str, uri: str, tmp_path: Path
) -> None:
    file, change = ATTACKS[attack]
    name, mark = re.sub(r"\W", "-", attack), tmp_path / "executed"
    options = sections.RegistryOptions(uri=uri, artifacts=str(tmp_path / "registry"))
    kept = Registry(options)
    kept.register(name, prepare_run(open_storage(str(tmp_path)), 0))
    (path,) = (tmp_path / "registry").rglob(file)
    path.write_bytes(change(path.read_bytes(), mark))
    reference = f"models:/{name}/1"
    with pytest.raises(
        UserError, match=rf"{file} is damaged or was replaced: it has sha256 "
    ) as raised:
        open_model(reference, options, sections.StorageOptions())
    assert "\n" not in str(raised.value)

    # If the checksum in the registry was changed as well, loading rejects the file.
    kept.client.set_model_version_tag(
        name, "1", f"sha256.{file}", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    with pytest.raises(UserError, match=re.escape(file)) as raised:
        open_model(reference, options, sections.StorageOptions())
    assert "\n" not in str(raised.value)
    assert not mark.exists()


def test_a_version_with_files_elsewhere_or_without_some_is_rejected(
    uri: str, tmp_path: Path
) -> None:
    options = sections.RegistryOptions(uri=uri, artifacts=str(tmp_path / "registry"))
    kept = Registry(options)
    kept.register("elsewhere", prepare_run(open_storage(str(tmp_path)), 0))
    (path,) = (tmp_path / "registry").rglob("model.json")
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"model\.json of elsewhere version 1 cannot be read"):
        kept.download("elsewhere", 1, tmp_path / "there")
    path.write_bytes(content)
    kept.client.set_model_version_tag("elsewhere", "1", "sha256.other/outside", "0" * 64)
    with pytest.raises(UserError, match=r"names a file 'other/outside'"):
        kept.download("elsewhere", 1, tmp_path / "there")
    kept.client.delete_model_version_tag("elsewhere", "1", "sha256.other/outside")
    kept.client.delete_model_version_tag("elsewhere", "1", "sha256.model.json")
    with pytest.raises(UserError, match=r"has no checksum of model\.json"):
        kept.download("elsewhere", 1, tmp_path / "there")
