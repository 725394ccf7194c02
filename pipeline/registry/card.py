"""The model card of a registered version: what it is, what it was trained on, how good it is, how
to use it, and its limits.
"""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.measure import with_error

TELLS_THE_CLASS = {
    "linear": "a linear probe of the code",
    "two_layer": "a two-layer probe of the code",
    "majority": "always the most frequent class",
}


def text(
    name: str, training: Mapping[str, Any], evaluation: Mapping[str, Any], origin: Mapping[str, str]
) -> str:
    """The card of a model as Markdown.

    training, evaluation: their records. origin: the version's tags, where it comes from.
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
    shape = evaluation["image_shape"]
    size = f"{model['latents']} {'maps' if model['code'] == 'maps' else 'latents'}"
    of_all = (
        f"{figures['rate_bits']:.1f} bits of an image, of {figures['elbo_nats'] / math.log(2):.0f}"
        " in all"
    )
    lines = [
        f"# {name}",
        "",
        (
            f"A Variational Lossy Autoencoder for images of {' x '.join(map(str, shape))} (channels"
            f" x height x width), pixels {pixels}. Its decoder draws each pixel from the code and"
            f" from {window}; what that window can predict is not in the code."
        ),
        "",
        "| | |",
        "| --- | --- |",
        f"| code | {size}; prior {prior}; posterior a diagonal Gaussian{posterior} |",
        f"| trained on | `{config['dataset']['name']}`, manifest sha256 `{training['manifest']}` |",
        (
            f"| for | {config['train']['images']:,} images, repeats included; seed"
            f" {config['train']['seed']} |"
        ),
        (
            f"| by | code version `{origin['code_version']}`, run `{origin['run']}`, MLflow run"
            f" `{origin['run_id']}` |"
        ),
    ]
    if "search" in origin:
        lines.append(
            f"| trial of | search `{origin['search_name']}`, MLflow run `{origin['search']}` |"
        )
    lines += [
        "",
        f"## How good it is, on {images}",
        "",
        "| | nats per image | |",
        "| --- | --- | --- |",
        (
            f"| rate | {with_error(figures, 'rate_nats')} | {figures['rate_bits']:.2f} bits per"
            " image |"
        ),
        f"| distortion | {with_error(figures, 'distortion_nats')} | |",
        (
            f"| code length (-ELBO) | {with_error(figures, 'elbo_nats')} |"
            f" {figures['elbo_bits_per_dim']:.4f} bits per dim |"
        ),
    ]
    if "iwae_nats" in figures:
        bound = f"-IWAE, k = {figures['iwae_samples']}"
        lines.append(
            f"| {bound} | {with_error(figures, 'iwae_nats')} | {figures['iwae_bits_per_dim']:.4f}"
            " bits per dim |"
        )
    for probe, label in TELLS_THE_CLASS.items():
        if probe in figures.get("probe", {}):
            lines.append(
                f"| class told by {label} | |"
                f" {with_error(figures['probe'][probe], 'accuracy', factor=100)} % |"
            )
    lines += [
        "",
        (
            "Errors are standard errors over images. Both bounds are upper bounds on the negative"
            " log-likelihood; an importance-weighted bound is not an ELBO. Noise is drawn from"
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
        'mlflow.set_tracking_uri("...")  # the registry that it is in',
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
        (
            f"- It knows images like those of `{config['dataset']['name']}` only; of others its"
            " bounds and codes say little."
        ),
        (
            "- The code drops what the window can predict, whether a task needs it or not: it"
            f" carries {of_all}."
        ),
        (
            f"- `{split}` figures of a model that was chosen by them are a little too good; measure"
            " a chosen one on `test`."
        ),
    ]
    return "\n".join(lines) + "\n"
