"""The bounds of ``vlae evaluate``: the same to the last bit, however the work is divided."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlae
from pipeline import cli
from pipeline.data.batch import Batch
from pipeline.evaluation import estimates, evaluation
from pipeline.evaluation.estimates import in_batches
from pipeline.evaluation.measure import importance_noise
from pipeline.training import loop
from tests.pipeline import strokes

MODEL = vlae.build(image_shape=(1, 8, 8), window="3x1", latents=3, flow_depth=0)
IMAGES, SAMPLES = 21, 40

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run."""
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    loop.fit(strokes.train_config(root, "name=run"))
    return f"{root}/runs/run"


@pytest.fixture
def evaluate(run: str, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run ``vlae evaluate`` on training images; gives its figures, or its error."""

    def evaluate(output: Path, *options: str, code: int = 0) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            cli.main(
                [
                    "evaluate",
                    f"model={run}",
                    f"output={output}",
                    "split=train",
                    "probe_images=30",
                    f"bounds.samples={SAMPLES}",
                    f"bounds.num_images={IMAGES}",
                    "bounds.pictures=2",
                    *options,
                ]
            )
        error = capsys.readouterr().err
        assert ended.value.code == code, error
        if code:
            return {"error": error.splitlines()[-1]}
        result = json.loads((output / "result.json").read_text())
        return dict(result[result["split"]])

    return evaluate


@pytest.fixture
def expected(evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures if this process measures all images in one block, one pass after the other."""
    monkeypatch.setattr(estimates, "num_threads", lambda device: 1)
    return evaluate(tmp_path / "expected")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first image of each block, as they are measured in this process."""
    starts, original = list[int](), estimates.estimate_block

    def estimate_block(*arguments: Any) -> Any:
        starts.append(arguments[-3])
        return original(*arguments)

    monkeypatch.setattr(estimates, "estimate_block", estimate_block)
    return starts


@pytest.mark.parametrize(("block", "threads"), [(1, 1), (1, 3), (2, 2), (3, 1), (512, 4)])
def test_blocks_and_threads_do_not_change_a_bit(
    block: int,
    threads: int,
    evaluate: Evaluate,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimates, "BLOCK", block)
    for module in (estimates, evaluation):
        monkeypatch.setattr(module, "num_threads", lambda device: threads)
    assert evaluate(tmp_path / "other") == expected
    assert len(list((tmp_path / "other/estimates").rglob("*.safetensors"))) == -(
        -IMAGES // (3 * block)
    )


def test_ray_tasks_do_not_change_a_bit(
    ray_cluster: str,
    evaluate: Evaluate,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimates, "BLOCK", 2)
    monkeypatch.setattr(estimates, "ALONE", 0)

    def fail() -> None:
        raise AssertionError("this process measures a block by itself")

    monkeypatch.setattr(estimates, "keep_freed_memory", fail)
    assert evaluate(tmp_path / "tasks") == expected


def test_an_interrupted_command_continues_with_the_missing_blocks(
    evaluate: Evaluate,
    expected: dict[str, Any],
    measured: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimates, "BLOCK", 2)
    counted = estimates.estimate_block

    def killed(*arguments: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(estimates, "estimate_block", killed)
    evaluate(tmp_path / "cut", code=130)
    assert measured == [0, 6]
    assert not (tmp_path / "cut/result.json").exists()
    monkeypatch.setattr(estimates, "estimate_block", counted)
    assert evaluate(tmp_path / "cut") == expected
    assert measured == [0, 6, 12, 18]


def test_more_images_reuse_the_blocks_of_fewer(
    evaluate: Evaluate, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "BLOCK", 2)
    few = evaluate(tmp_path, "bounds.num_images=12")
    assert (few["num_images"], measured) == (12, [0, 6])
    more = evaluate(tmp_path)
    assert (more["num_images"], measured) == (IMAGES, [0, 6, 12, 18])


@pytest.mark.parametrize("option", ["bounds.samples=39", "bounds.seed=1", "split=valid"])
def test_other_settings_share_no_blocks(
    option: str, evaluate: Evaluate, measured: list[int], tmp_path: Path
) -> None:
    one = evaluate(tmp_path, "bounds.num_images=4")
    other = evaluate(tmp_path, "bounds.num_images=4", option)
    assert measured == [0, 0]
    assert one["iwae_nats"] != other["iwae_nats"]


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "fewer"])
def test_a_damaged_block_is_named(damage: str, evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(tmp_path)
    (block,) = (tmp_path / "estimates").rglob("*.safetensors")
    content = block.read_bytes()
    if damage == "fewer":
        evaluate(tmp_path, "bounds.num_images=5")
        (small,) = set((tmp_path / "estimates").rglob("*.safetensors")) - {block}
        content = small.read_bytes()
    block.write_bytes(
        {"cut": content[:-9], "empty": b"", "fewer": content}.get(
            damage, content.replace(b"iwae", b"ewai")
        )
    )
    error = evaluate(tmp_path, code=2)["error"]
    assert block.name in error
    assert "damaged; delete it" in error


@given(st.integers(0, 2**40), st.integers(1, 3000), st.integers(1, 40))
def test_samples_of_an_image_are_the_same_for_every_k_and_batch(
    image: int, samples: int, others: int
) -> None:
    alone = drawn([image], 3000)[:samples, 0]
    together = drawn([image + others, image], samples)[:, 1]
    assert torch.equal(alone, together)


def drawn(images: list[int], samples: int) -> torch.Tensor:
    """The noise of some images: (samples, images, latents)."""
    positions = np.array(images)
    batch = Batch(0, torch.zeros(len(images), 1, 8, 8), torch.zeros(0), positions, positions)
    parts = list(importance_noise(MODEL, batch, samples, 7))
    assert max(part.shape[0] * part.shape[1] for part in parts) <= 1024
    return torch.cat(parts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_blocks_are_cut_into_batches_without_loss(sizes: list[int], batch: int) -> None:
    total = sum(sizes)
    numbers = torch.arange(float(total))

    def blocks() -> Iterator[vlae.Estimate]:
        for part in numbers.split(sizes):
            yield vlae.Estimate(part, part[:, None] + torch.tensor([0.0, 0.5]), -part)

    batches = list(in_batches(blocks(), batch))
    assert [len(each.iwae) for each in batches] == [len(each) for each in numbers.split(batch)]
    assert torch.equal(torch.cat([each.distortion for each in batches]), numbers)
    assert torch.equal(torch.cat([each.iwae for each in batches]), -numbers)
    assert torch.equal(torch.cat([each.rate_per_latent for each in batches])[:, 0], numbers)
