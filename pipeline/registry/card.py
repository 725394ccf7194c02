"""The card of a registered, pretrained or exported model: architecture, data, figures, limits."""

import json
import re
from collections.abc import Mapping, Sequence

from pipeline.values import JsonObject, Measured

PROBE_LABELS = {
    "linear": "a linear probe of the code",
    "two_layer": "a two-layer probe of the code",
    "majority": "always the most frequent class",
}
"""How the card names what predicts the class."""


def text(name: str, training: JsonObject, evaluation: JsonObject, origin: Mapping[str, str]) -> str:
    """The card of a registered model as Markdown.

    training, evaluation: their records. origin: the version's tags.
    """
    made = [
        (
            f"| by | code version {_code(origin['code_version'])}, run {_code(origin['run'])},"
            f" MLflow run {_code(origin['run_id'])} |"
        )
    ]
    if "search" in origin:
        made.append(
            f"| trial of | search {_code(origin['search_name'])}, MLflow run"
            f" {_code(origin['search'])} |"
        )
    address = f"models:/{_plain(name)}@champion"
    loading = [
        "import mlflow.artifacts, vlae",
        "",
        'mlflow.set_tracking_uri("...")  # the address of the registry',
        f'model = vlae.load(mlflow.artifacts.download_artifacts("{address}"))',
    ]
    return "\n".join(
        [
            *_summary(name, training, evaluation["image_shape"], made),
            *_figures(evaluation),
            *_loading(loading, evaluation["image_shape"]),
            *_limits(training, evaluation),
            "",
        ]
    )


def pretrained(
    name: str, training: JsonObject, evaluation: JsonObject, origin: Mapping[str, str]
) -> str:
    """The card of a pretrained model as Markdown.

    training, evaluation: their records. origin: ``code_version``, ``date``, ``cost`` of training,
    the ``command`` that measured it, and the ``licence`` of its data.
    """
    made = [
        f"| cost of training | {_plain(origin['cost'])} |",
        f"| by | code version {_code(origin['code_version'])}, {_plain(origin['date'])} |",
    ]
    loading = [
        "import vlae",
        "from vlae import pretrained",
        "",
        f'model = vlae.load("{_plain(name)}")',
        f'images = pretrained.examples("{_plain(name)}")  # of the test set',
    ]
    return "\n".join(
        [
            *_summary(name, training, evaluation["image_shape"], made),
            "",
            "All options of its training are in `training.json`.",
            *_figures(evaluation),
            f"Measured on {_plain(origin['date'])} by `{origin['command']}`.",
            "",
            *_loading(loading, evaluation["image_shape"]),
            "## Data",
            "",
            _plain(origin["licence"]),
            "",
            *_limits(training, evaluation),
            "",
        ]
    )


def exported(
    name: str,
    training: JsonObject,
    evaluation: JsonObject | None,
    interface: JsonObject,
    licence: str | None,
) -> str:
    """The card of a folder for a model hub, with the front matter that hubs read.

    training, evaluation: their public records; without an evaluation the card has no figures.
    interface: what ``config.json`` holds. licence: an SPDX expression.
    """
    loading = ["import vlae", "", 'model = vlae.load("...")  # this folder, downloaded']
    differences = ", ".join(
        f"{graph} {found['difference']:.0e}" for graph, found in interface["graphs"].items()
    )
    return "\n".join(
        [
            *_front_matter(name, training, evaluation, licence),
            *_summary(name, training, interface["image_shape"], []),
            *(_figures(evaluation) if evaluation else [""]),
            *_loading(loading, interface["image_shape"]),
            "## Without this package",
            "",
            (
                "`encoder.onnx` maps images to codes, and `decoder.onnx` codes and the pixels so"
                " far to the parameters of each pixel's distribution; `.pt2` are the same graphs by"
                " `torch.export`. `config.json` names their inputs and outputs. Largest"
                f" differences from the model, relative to the largest value: {differences}."
            ),
            "",
            *_limits(training, evaluation),
            "",
        ]
    )


def _front_matter(
    name: str, training: JsonObject, evaluation: JsonObject | None, licence: str | None
) -> list[str]:
    """The lines of YAML, each value as JSON, which is YAML, too."""
    fields: JsonObject = {
        "library_name": "vlae-pipeline",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vlae", "variational-autoencoder", "autoregressive", "onnx", "safetensors"],
    }
    if licence:
        # Hubs know single licences by their identifiers in lower case.
        is_single = re.fullmatch(r"[A-Za-z0-9.-]+", licence) and "LicenseRef" not in licence
        fields["license"] = licence.lower() if is_single else "other"
        if not is_single:
            fields["license_name"] = licence
    if evaluation:
        split = evaluation["split"]
        metrics = [
            {"type": key, "value": evaluation[split][key]}
            for key in ("elbo_bits_per_dim", "iwae_bits_per_dim", "rate_bits", "resolution_px")
            if evaluation[split].get(key) is not None
        ]
        data = training["config"]["dataset"]["name"]
        result = {
            "task": {"type": "image-feature-extraction"},
            "dataset": {"name": data, "type": data, "split": split},
            "metrics": metrics,
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---", ""]


def _summary(
    name: str, training: JsonObject, shape: Sequence[int], made: Sequence[str]
) -> list[str]:
    """What the model is, and how it was made: ``made`` are more rows of the table."""
    config = training["config"]
    model = config["model"]
    window = (
        "every earlier pixel"
        if model["window"].startswith("full")
        else f"a {model['window']} window of earlier pixels"
    )
    prior = (
        f"an autoregressive flow of depth {model['flow_depth']}"
        if model["flow_depth"]
        else "a standard normal"
    )
    posterior = (
        f", then {model['posterior_depth']} inverse autoregressive steps"
        if model["posterior_depth"]
        else ""
    )
    pixels = (
        "256 values"
        if config["dataset"]["binarization"] == "none"
        else f"black or white ({config['dataset']['binarization']})"
    )
    data = _code(config["dataset"]["name"])
    splits = ", its validation images included" if config["train"].get("with_valid") else ""
    size = f"{model['latents']} {'maps' if model['code'] == 'maps' else 'latents'}"
    return [
        f"# {_plain(name)}",
        "",
        (
            f"A Variational Lossy Autoencoder for images of {' x '.join(map(str, shape))} (channels"
            f" x height x width), pixels {pixels}. Its decoder predicts each pixel from the code"
            f" and {window}; the code omits what that window can predict."
        ),
        "",
        "| | |",
        "| --- | --- |",
        f"| code | {size}; prior {prior}; posterior a diagonal Gaussian{posterior} |",
        f"| trained on | {data}{splits}, manifest sha256 {_code(training['manifest'])} |",
        (
            f"| trained for | {config['train']['images']:,} images, counting repeats; seed"
            f" {config['train']['seed']} |"
        ),
        *made,
    ]


def _figures(evaluation: JsonObject) -> list[str]:
    """The table of figures, and the pictures."""
    split, bounds = evaluation["split"], evaluation["bounds"]
    figures = evaluation[split]
    elbo = Measured.from_json(figures, "elbo_nats")
    lines = [
        "",
        f"## Figures on {figures['num_images']:,} images of `{split}`",
        "",
        "| | nats per image | |",
        "| --- | --- | --- |",
        (
            f"| rate | {Measured.from_json(figures, 'rate_nats').text()} |"
            f" {figures['rate_bits']:.2f} bits per image |"
        ),
        f"| distortion | {Measured.from_json(figures, 'distortion_nats').text()} | |",
        (
            f"| code length (-ELBO) | {elbo.text()} |"
            f" {figures['elbo_bits_per_dim']:.4f} bits per dim |"
        ),
    ]
    if "iwae_nats" in figures:
        bound = f"-IWAE, k = {figures['iwae_samples']}"
        lines.append(
            f"| {bound} | {Measured.from_json(figures, 'iwae_nats').text()} |"
            f" {figures['iwae_bits_per_dim']:.4f} bits per dim |"
        )
    if figures.get("resolution_px") is not None:
        resolution = Measured.from_json(figures, "resolution_px")
        lines.append(f"| resolution: coarser structure is kept | | {resolution} |")
    for probe, label in PROBE_LABELS.items():
        if probe in figures.get("probe", {}):
            accuracy = Measured.from_json(figures["probe"][probe], "accuracy").percent
            lines.append(f"| class predicted by {label} | | {accuracy} |")
    return [
        *lines,
        "",
        (
            "Errors are standard errors over images. Both bounds are upper bounds on the negative"
            " log-likelihood; an importance-weighted bound is not an ELBO. All noise is drawn from"
            f" seed {bounds['seed']}. All figures are in `evaluation.json`."
        ),
        "",
        *(
            f"![{picture.rpartition('/')[2].removesuffix('.png')}]({picture.rpartition('/')[2]})\n"
            for picture in evaluation["pictures"]
        ),
    ]


def _loading(lines: Sequence[str], image_shape: Sequence[int]) -> list[str]:
    shape = ", ".join(map(str, image_shape))
    return [
        "## How to load it",
        "",
        "```python",
        *lines,
        f"code = model.encoder(images).code  # images: (batch, {shape}), pixels in [0, 1]",
        "```",
        "",
        "The weights are safetensors, the rest is JSON: nothing is unpickled or executed.",
        "",
    ]


def _limits(training: JsonObject, evaluation: JsonObject | None) -> list[str]:
    return ["## Limits", "", *(f"- {limit}" for limit in limits(training, evaluation))]


def limits(training: JsonObject, evaluation: JsonObject | None) -> list[str]:
    """What the model is not good for, a sentence each. ``evaluation``: None if it has none."""
    data = _code(training["config"]["dataset"]["name"])
    trained = f"It was trained on {data} only; on other images its bounds and codes mean little."
    if evaluation is None:
        return [
            trained,
            "The code omits what the window can predict, whether a task needs it or not.",
        ]
    split = evaluation["split"]
    bits = Measured.from_json(evaluation[split], "elbo_nats").bits
    found = [
        trained,
        (
            "The code omits what the window can predict, whether a task needs it or not: it"
            f" carries {evaluation[split]['rate_bits']:.1f} of an image's {bits:.0f} bits."
        ),
    ]
    if split != "test":
        found.append(
            f"If the model was chosen by its `{split}` figures, they are a little too good;"
            " measure it on `test`."
        )
    return found


def _plain(value: object) -> str:
    """A value without the characters that mean something in Markdown or HTML."""
    return re.sub(r"[^\w .,:;@/+-]", "", str(value))


def _code(value: object) -> str:
    return f"`{_plain(value)}`"
