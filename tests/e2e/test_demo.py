"""The demo, made small: its own S3 server, its own Ray, its own registry."""

import json
from pathlib import Path

import numpy as np

from tests.e2e.conftest import Run
from tests.pipeline.strokes import SHARDS, TINY, Strokes


def test_the_demo_goes_from_images_to_a_registered_model_and_reuses_what_exists(
    run: Run, workplace: Path
) -> None:
    arrays = dict[str, np.ndarray]()
    for split, sizes in SHARDS.items():
        images, labels = Strokes().read(split, 0, sum(sizes))
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(workplace / "strokes.npz", **arrays)
    command = ["demo", *TINY, "dataset=npz", "dataset.path=strokes.npz"]
    command += [
        "search.space.model.window=[3x1]",
        "search.space.model.latents=[2,4]",
        "search.space.model.flow_depth=[0]",
        "search.num_trials=2",
        "search.constraints=[]",
        "bounds.samples=4",
        "bounds.num_images=13",
    ]
    done = run(*command, standalone=True)
    assert "starting Ray" in done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"result: {workplace}/demo/result.json"
    result = json.loads((workplace / "demo/result.json").read_text())
    assert result["test"]["iwae_samples"] == 4
    assert result["test"]["num_images"] == 13
    assert {"iwae_nats", "elbo_nats", "rate_bits"} <= result["test"].keys()
    assert result["registry"]["name"] == "vlae-strokes"
    assert result["registry"]["version"] == 1
    assert all(Path(picture).exists() for picture in result["pictures"])
    assert (workplace / "demo/search/search.html").read_text().startswith("<!doctype html>")
    again = run(*command, standalone=True)
    assert "starting Ray" not in again.stderr, "nothing is left to compute"
    assert json.loads((workplace / "demo/result.json").read_text())["test"] == result["test"]
