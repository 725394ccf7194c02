"""The records of a model without the addresses of the machines and buckets that it came from.

What is published is read by everybody: it names no folder, bucket or server.
"""

from pipeline.values import JsonObject

PRIVATE = ("storage", "registry", "cluster", "name")
"""Sections of a run's options that say where it ran, and decide nothing about the model."""


def training(record: JsonObject) -> JsonObject:
    """The record of a training without addresses."""
    config = {key: value for key, value in record["config"].items() if key not in PRIVATE}
    kept = {key: config["dataset"][key] for key in ("name", "binarization")}
    return {**record, "config": {**config, "dataset": kept}}


def evaluation(record: JsonObject) -> JsonObject:
    """The record of an evaluation without addresses; pictures are the names of their files."""
    names = [url.rpartition("/")[2] for url in record["pictures"]]
    kept = ("weights", "architecture", "image_shape", "bounds", "split", record["split"])
    manifest = {"manifest": record["dataset"]["manifest"]}
    return {key: record[key] for key in kept} | {"dataset": manifest, "pictures": names}
