"""A folder with all that a model hub and other programs need of a model, and no address in it.

``README.md`` is the card, with front matter. ``model.safetensors`` and ``model.json`` are what
``vlae.load`` reads. ``config.json`` says how the graphs of ``encoder`` and ``decoder`` are called.
"""

import dataclasses
from pathlib import Path

import vlae
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.export.graphs import write_graphs
from pipeline.registry import card, public
from pipeline.registry.files import CARD_FILE
from pipeline.registry.models import copy_evaluation
from pipeline.runs import EVALUATION, TRAINING_FILE, OpenedModel
from pipeline.storage.base import to_json
from pipeline.values import JsonObject

CONFIG_FILE = "config.json"


def write_folder(
    model: OpenedModel, name: str, registry: RegistryOptions, storage: StorageOptions, folder: Path
) -> JsonObject:
    """Write the files into ``folder``, an empty one. Returns what ``config.json`` holds.

    Raises UserError if a graph cannot be made or held to the model.
    """
    interface = describe(model)
    interface["graphs"] = {
        graph: dataclasses.asdict(written)
        for graph, written in write_graphs(model.network, folder).items()
    }
    vlae.save(model.network, folder)
    training = public.training(model.training)
    evaluation = copy_evaluation(model, registry, storage, folder)
    if evaluation is not None:
        evaluation = public.evaluation(evaluation)
        (folder / f"{EVALUATION}.json").write_bytes(to_json(evaluation))
    (folder / TRAINING_FILE).write_bytes(to_json(training))
    (folder / CONFIG_FILE).write_bytes(to_json(interface))
    text = card.exported(name, training, evaluation, interface, registry.license)
    (folder / CARD_FILE).write_text(text)
    return interface


def describe(model: OpenedModel) -> JsonObject:
    """What a program has to know to call the graphs, besides their inputs and outputs.

    ``levels``: a pixel's values are k / (2^levels - 1). ``shear``: pixel (row, column) can be drawn
    once all pixels with a smaller column + shear * row are.
    """
    network = model.network
    _, height, width = network.image_shape
    context = network.decoder.context
    return {
        "model_type": "vlae",
        "image_shape": list(network.image_shape),
        "latents": network.latents,
        "nested": model.is_nested,
        "window": str(network.decoder.window),
        "likelihood": network.arguments.get("likelihood", "bernoulli"),
        "levels": network.decoder.likelihood.levels,
        "shear": 0 if context is None else context.front(1, height, width).shear,
    }
