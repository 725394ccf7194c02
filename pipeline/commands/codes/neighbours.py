"""``vlae neighbours``: the images whose codes are nearest, and near-duplicates, without Ray."""

from dataclasses import dataclass
from typing import Any

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL, ANOTHER_DATA_SET, MODEL_NAME
from pipeline.config.options import option, section
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.values import JsonObject, Measured

COLUMNS = {
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "mean_average_precision": "mean average precision",
}
"""The scores in the order of the report, and the head of each."""
EXAMPLES = 20
"""Pairs of duplicates in the result and in the picture."""


@dataclass
class NeighboursConfig:
    """Find the images whose codes are nearest to an image's, and pairs that are nearly the same."""

    model: str = option(A_MODEL)
    beside: list[str] = option(
        "more models whose codes are compared, such as one of window 0x0", []
    )
    split: str = option("the images whose neighbours are sought: train, valid or test", "test")
    among: str | None = option(
        "the split that is searched; by default the same, each image itself left out", None
    )
    images: list[Any] = option(
        "the images to show, by their names at the source or their numbers in the split; none draws"
        " some at random",
        [],
    )
    shown: int = option("images to show if none are named", 8, at_least=1, at_most=100)
    neighbours: int = option("neighbours of each image", 10, at_least=1, at_most=1000)
    num_images: int | None = option(
        "images whose neighbours are written and scored, the first of the split; none is all",
        10_000,
        at_least=1,
    )
    duplicates: bool = option(
        "also search all splits for pairs of images that are equal or nearly so", False
    )
    codes: list[str] = option(
        "folders in which vlae encode has left the model's codes; others are computed here", []
    )
    dataset_url: str | None = option(ANOTHER_DATA_SET, None, path=True)
    seed: int = option("the seed of binarization and of the images to show", 0)
    output: str = option(
        "where the table and the pictures go", f"outputs/neighbours/{MODEL_NAME}", path=True
    )
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")


def run(config: NeighboursConfig) -> JsonObject:
    """Write the table and the sheet of neighbours, and the report of duplicates if wanted.

    Raises UserError if a model, the data set, a split, a named image or codes do not exist, or do
    not belong together.
    """
    import torch

    from pipeline.machine import device, num_threads
    from pipeline.registry.models import open_models
    from pipeline.retrieval import duplicates
    from pipeline.retrieval.collection import collect, stored_codes
    from pipeline.retrieval.neighbours import PIXELS, Search, check, find
    from pipeline.storage import open_storage

    torch.set_num_threads(1)
    addresses = list(dict.fromkeys([config.model, *config.beside]))
    models, data = open_models(addresses, config.dataset_url, config.registry, config.storage)
    among = config.among or config.split
    check(data, config.split, among)
    shown = find(data, config.split, config.images, config.shown, config.seed)

    folders = [open_storage(each, config.storage.endpoint_url) for each in config.codes]
    needed = dict.fromkeys([config.split, among])
    if config.duplicates:
        needed |= dict.fromkeys(data.manifest.splits)
    splits = {}
    for split in needed:
        stored = stored_codes(folders, models[0], data, split)
        splits[split] = collect(data, models, split, config.seed, stored)

    output = open_storage(config.output, config.storage.endpoint_url)
    total = data.manifest.num_samples(config.split)
    search = Search(
        data, splits[config.split], splits[among], min(config.num_images or total, total)
    )
    name = models[0].reference
    labels = {each.reference: f"codes of {each.reference.rpartition('/')[2]}" for each in models}
    output.write("neighbours.parquet", search.table(name, config.neighbours))
    sheet = search.sheet(shown, config.neighbours, {**labels, PIXELS: PIXELS})
    output.write("neighbours.png", sheet)
    result: JsonObject = {
        "model": name,
        "weights": models[0].weights,
        "beside": {each.reference: each.weights for each in models[1:]},
        "dataset": {"url": data.storage.url, "manifest": data.manifest.digest},
        "split": config.split,
        "among": among,
        "images": search.num_queries,
        "neighbours": config.neighbours,
        "seed": config.seed,
        "shown": [splits[config.split].name(number) for number in shown],
        "scores": search.scores(),
        "table": f"{output.url}/neighbours.parquet",
        "pictures": [f"{output.url}/neighbours.png"],
    }
    if config.duplicates:
        ordered = [splits[split] for split in data.manifest.splits]
        pairs = duplicates.duplicates(ordered, name, num_threads(device()))
        result["duplicates"] = duplicates.summary(pairs, splits, EXAMPLES)
        output.write("duplicates.parquet", duplicates.table(pairs, splits))
        result["duplicates"]["table"] = f"{output.url}/duplicates.parquet"
        if pairs:
            output.write("duplicates.png", duplicates.sheet(data, pairs[:EXAMPLES], splits))
            result["pictures"].append(f"{output.url}/duplicates.png")
    return result


def format_result(config: NeighboursConfig, result: JsonObject) -> str:
    """The scores, the numbers of duplicates, and where the table and the pictures are."""
    lines = [
        f"the {result['neighbours']} nearest of {result['among']} by code, for"
        f" {result['images']:,} {result['split']} images: {result['table']}"
    ]
    if result["scores"]:
        names = {name: name.rpartition("/")[2] for name in result["scores"]}
        width = max(map(len, names.values())) + 2
        lines.append("found by class, in %:")
        lines.append(
            " " * (width + 2) + "".join(f"{head:<24}" for head in COLUMNS.values()).rstrip()
        )
        for name, figures in result["scores"].items():
            shown = [Measured.from_json(figures, key).percent.text(1) for key in COLUMNS]
            row = "".join(f"{text:<24}" for text in shown).rstrip()
            lines.append(f"  {names[name]:<{width}}{row}")
    if "duplicates" in result:
        found = result["duplicates"]
        for kind, words in (("equal", "equal"), ("near", "nearly equal")):
            across = ", ".join(
                f"{count:,} across {splits}"
                for splits, count in found["across_splits"][kind].items()
            )
            lines.append(
                f"{found[kind]:,} pairs of {words} images" + (f": {across}" if across else "")
            )
        lines.append(f"pairs: {found['table']}")
    return "\n".join([*lines, *(f"picture: {url}" for url in result["pictures"])])


COMMAND = Command(NeighboursConfig, run, format_result, lambda config: config.output)
