"""``vlae evaluate``: a model's bounds on held-out images, what its codes know, and its pictures. It
needs no Ray.
"""

import math
from typing import Any

from pipeline.commands import Command
from pipeline.config.evaluation import EvaluateConfig
from pipeline.values import JsonObject

PROBED = {
    "train": ", on the images that the probes were fitted on",
    "valid": ", on the images that chose the probes",
}
"""What the report has to say of the probes' accuracy on a split that is not the test's."""

PROBES = {
    "linear": "linear probe",
    "two_layer": "two-layer probe",
    "linear_of_sample": "linear probe of one z",
    "majority": "always one class",
}

SHOWN = 16
"""So many values of a list are in the report."""


def run(config: EvaluateConfig) -> JsonObject:
    """Measure, draw and write everything to ``config.output``.

    The figures of a registered model are kept with its version, too. Raises UserError if the model,
    the data set or the split does not exist, or the images have another shape.
    """
    from pipeline.evaluation.evaluation import evaluate
    from pipeline.registry.models import open_model
    from pipeline.registry.versions import Registry

    model = open_model(config.model, config.registry, config.storage)
    result = evaluate(config, model)
    if model.version:
        name, number = model.version["name"], model.version["version"]
        measured = result[config.split]
        Registry(config.registry).log_evaluation(name, number, config.split, measured)
    return result


def format_result(config: EvaluateConfig, result: JsonObject) -> str:
    """The measured figures as text, and the pictures' addresses."""
    pictures = [f"picture: {url}" for url in result["pictures"]]
    return "\n".join([format_report(result, config.split), *pictures])


def format_report(result: JsonObject, split: str) -> str:
    """The measured figures as text."""
    from pipeline.evaluation.measure import with_error

    measured = result[split]
    rows = [
        ("rate", "rate_nats", f"{measured['rate_bits']:.2f} bits per image"),
        ("distortion", "distortion_nats", ""),
        ("code length (-ELBO)", "elbo_nats", f"{measured['elbo_bits_per_dim']:.4f} bits per dim"),
    ]
    if "iwae_nats" in measured:
        rows += [
            (
                f"-IWAE, k = {measured['iwae_samples']}",
                "iwae_nats",
                f"{measured['iwae_bits_per_dim']:.4f} bits per dim",
            ),
            ("posterior slack", "slack_nats", "code length less -IWAE"),
        ]
    if "mutual_information_nats" in measured:
        compared = measured["mutual_information_images"]
        told = (
            f"{measured['mutual_information_bits']:.2f} bits, of {math.log2(compared):.2f} that"
            f" tell {compared:,} images apart"
        )
        rows += [
            ("I(x; z), at least", "mutual_information_nats", told),
            ("KL(q(z) || p(z)), at most", "marginal_kl_nats", "rate less I(x; z)"),
        ]
    lines = [
        f"{architecture_line(result)}; {measured['num_images']:,} {split} images, nats per image:"
    ]
    lines += [
        f"  {label:<26}{with_error(measured, key, 3):<20}{extra}".rstrip()
        for label, key, extra in rows
    ]
    latents = measured["latents"]
    lines.append(
        f"{measured['active_units']} of {len(latents['code_variance'])} latents are active"
    )
    if "capacity_bits" in latents:
        lines[-1] += (
            f"; the most that each can tell, in bits, together {measured['capacity_bits']:.2f}:"
        )
        lines.append(_first(sorted(latents["capacity_bits"], reverse=True)))
    if "group_rate_bits" in latents:
        lines += ["rate of each group of latents, in bits:", _first(latents["group_rate_bits"])]
    if "probe" in measured:
        lines.append(f"class told from the code, accuracy in %{PROBED.get(split, '')}:")
        for name, label in PROBES.items():
            probe = measured["probe"][name]
            extra = (
                f"{100 * probe['valid_accuracy']:.2f} on valid"
                if "valid_accuracy" in probe
                else "most frequent in training"
            )
            lines.append(f"  {label:<26}{with_error(probe, 'accuracy', factor=100):<20}{extra}")
    return "\n".join(lines)


def _first(values: list[float]) -> str:
    """The first of many values."""
    return (
        "  "
        + " ".join(f"{value:.2f}" for value in values[:SHOWN])
        + (" ..." if len(values) > SHOWN else "")
    )


def architecture_line(result: dict[str, Any]) -> str:
    """A model's architecture in a few words."""
    model = result["architecture"]
    return f"window {model['window']}, {model['latents']} latents, flow depth {model['flow_depth']}"


COMMAND = Command(EvaluateConfig, run, format_result, lambda config: config.output)
