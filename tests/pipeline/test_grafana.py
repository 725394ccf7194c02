"""Prometheus answers every query of ``infra/grafana.json`` from Ray's metrics endpoint."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from pipeline.cluster import connect
from pipeline.config.sections import ClusterOptions, StorageOptions
from pipeline.training import loop
from pipeline.training.launch import Gauges
from tests.pipeline import strokes

DASHBOARD = json.loads((Path(__file__).parents[2] / "infra/grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PROMETHEUS = shutil.which("prometheus")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The rows that a training run reports."""
    root, rows = str(tmp_path_factory.mktemp("store")), list[dict[str, float]]()
    strokes.write(strokes.data_storage(root))
    loop.fit(strokes.train_config(root, "train.images=80"), on_report=rows.append)
    return rows


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """The address of a Prometheus that asks ``target`` every second."""
    scrape = {"job_name": "ray", "static_configs": [{"targets": [target]}]}
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [
            *(str(PROMETHEUS), f"--config.file={folder / 'prometheus.yaml'}"),
            *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, path: str, **parameters: str) -> Any:
    """The data that Prometheus answers with; None while it does not answer yet."""
    query = urllib.parse.urlencode(parameters)
    try:
        with urllib.request.urlopen(f"{address}/api/v1/{path}?{query}", timeout=60) as answer:
            return json.load(answer)["data"]
    except (ConnectionError, urllib.error.URLError) as error:
        if getattr(error, "code", 503) != 503:  # it refuses the query
            raise
        return None


def test_the_dashboard_shows_every_value_that_training_reports(
    rows: list[dict[str, float]],
) -> None:
    logged = {"ray_vlae_" + re.sub(r"\W", "_", name) for row in rows for name in row}
    shown = {name for query in QUERIES for name in re.findall(r"ray_vlae_\w+", query)}
    assert shown == logged


@pytest.mark.skipif(
    PROMETHEUS is None, reason="there is no Prometheus on this machine: apt-get install prometheus"
)
@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_answers_every_query_of_the_dashboard(
    rows: list[dict[str, float]], tmp_path: Path
) -> None:
    connect(ClusterOptions(), StorageOptions())
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    for run in ("first", "second"):
        Gauges(run).set(rows[-1])
    with prometheus(tmp_path, f"127.0.0.1:{port}") as address:
        (runs,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "run"]
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", runs["definition"])
        assert asked
        label = f"label/{asked[2]}/values"
        # pytest's time limit ends it
        while not {"first", "second"} <= set(ask(address, label, **{"match[]": asked[1]}) or []):
            time.sleep(0.5)
        values = {}
        for query in QUERIES:
            found = ask(address, "query", query=query.replace("$run", "second|third"))
            (series,) = found["result"]
            assert series["metric"]["run"] == "second", query
            values[query] = float(series["value"][1])
    rate = values['ray_vlae_train_rate{run=~"$run"} / 0.6931471805599453']
    assert rate == pytest.approx(rows[-1]["train/rate"] / 0.6931471805599453)
    assert values['ray_vlae_images{run=~"$run"}'] == 80
