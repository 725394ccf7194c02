"""The demo, made small: its own S3 server, its own Ray, its own registry."""

import json
from pathlib import Path

from tests.e2e.conftest import TINY, Run


def test_the_demo_goes_from_images_to_a_registered_model_and_reuses_what_exists(
    run: Run, workplace: Path
) -> None:
    command = ["demo", *TINY, "search.space.model.window=[3x1]", "search.space.model.latents=[2,4]"]
    command += [
        "search.space.model.flow_depth=[0]",
        "search.num_trials=2",
        "search.constraints=[]",
        "bounds.samples=4",
        "bounds.num_images=100",
    ]
    done = run(*command, standalone=True)
    assert "starting Ray" in done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"result: {workplace}/demo/result.json"
    result = json.loads((workplace / "demo/result.json").read_text())
    assert result["test"]["iwae_samples"] == 4
    assert result["test"]["num_images"] == 100
    assert {"iwae_nats", "elbo_nats", "rate_bits"} <= result["test"].keys()
    assert result["registry"]["name"] == "vlae-mnist"
    assert result["registry"]["version"] == 1
    assert all(Path(picture).exists() for picture in result["pictures"])
    assert (workplace / "demo/search/search.html").read_text().startswith("<!doctype html>")
    again = run(*command, standalone=True)
    assert "starting Ray" not in again.stderr, "nothing is left to compute"
    assert json.loads((workplace / "demo/result.json").read_text())["test"] == result["test"]
