"""The model card of a registered version: its architecture, training data, figures and limits."""

import re
from collections.abc import Mapping

from pipeline.values import JsonObject, Measured

PROBE_LABELS = {
    "linear": "a linear probe of the code",
    "two_layer": "a two-layer probe of the code",
    "majority": "always the most frequent class",
}
"""How the card names what predicts the class."""


def text(name: str, training: JsonObject, evaluation: JsonObject, origin: Mapping[str, str]) -> str:
    """The card of a model as Markdown.

    training, evaluation: their records. origin: the version's tags.
    """
    config, split = training["config"], evaluation["split"]
    model, figures, bounds = config["model"], evaluation[split], evaluation["bounds"]
    images = f"{figures['num_images']:,} images of `{split}`"
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
    shape, data, name = evaluation["image_shape"], _code(config["dataset"]["name"]), _plain(name)
    size = f"{model['latents']} {'maps' if model['code'] == 'maps' else 'latents'}"
    elbo = Measured.from_json(figures, "elbo_nats")
    lines = [
        f"# {name}",
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
        f"| trained on | {data}, manifest sha256 {_code(training['manifest'])} |",
        (
            f"| trained for | {config['train']['images']:,} images, counting repeats; seed"
            f" {config['train']['seed']} |"
        ),
        (
            f"| by | code version {_code(origin['code_version'])}, run {_code(origin['run'])},"
            f" MLflow run {_code(origin['run_id'])} |"
        ),
    ]
    if "search" in origin:
        lines.append(
            f"| trial of | search {_code(origin['search_name'])}, MLflow run"
            f" {_code(origin['search'])} |"
        )
    lines += [
        "",
        f"## Figures on {images}",
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
    for probe, label in PROBE_LABELS.items():
        if probe in figures.get("probe", {}):
            accuracy = Measured.from_json(figures["probe"][probe], "accuracy").percent
            lines.append(f"| class predicted by {label} | | {accuracy} |")
    lines += [
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
        "## How to load it",
        "",
        "```python",
        "import mlflow.artifacts, vlae",
        "",
        'mlflow.set_tracking_uri("...")  # the address of the registry',
        f'model = vlae.load(mlflow.artifacts.download_artifacts("models:/{name}@champion"))',
        (
            f"code = model.encoder(images).code  # images: (batch, {', '.join(map(str, shape))}),"
            " pixels in [0, 1]"
        ),
        "```",
        "",
        "The weights are safetensors, the rest is JSON: nothing is unpickled or executed.",
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits(training, evaluation)),
    ]
    return "\n".join(lines) + "\n"


def limits(training: JsonObject, evaluation: JsonObject) -> list[str]:
    """What the model is not good for, a sentence each."""
    split, data = evaluation["split"], _code(training["config"]["dataset"]["name"])
    bits = Measured.from_json(evaluation[split], "elbo_nats").bits
    return [
        f"It was trained on {data} only; on other images its bounds and codes mean little.",
        (
            "The code omits what the window can predict, whether a task needs it or not: it"
            f" carries {evaluation[split]['rate_bits']:.1f} of an image's {bits:.0f} bits."
        ),
        (
            f"If the model was chosen by its `{split}` figures, they are a little too good;"
            " measure it on `test`."
        ),
    ]


def _plain(value: object) -> str:
    """A value without the characters that mean something in Markdown or HTML."""
    return re.sub(r"[^\w .,:;@/+-]", "", str(value))


def _code(value: object) -> str:
    return f"`{_plain(value)}`"
