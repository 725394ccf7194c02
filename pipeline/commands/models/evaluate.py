"""``vlae evaluate``: a model's bounds on held-out images, what its codes know, its pictures."""

import math

import vlae
from pipeline.commands import Command
from pipeline.config.evaluation import EvaluateConfig
from pipeline.values import JsonObject, Measured

SPLIT_NOTES = {
    "train": ", on the images that the probes were fitted on",
    "valid": ", on the images that chose the probes",
}
"""A warning about the probes' accuracy on a split that they have seen."""

PROBES = {
    "linear": "linear probe",
    "two_layer": "two-layer probe",
    "linear_of_sample": "linear probe of one z",
    "majority": "always one class",
}
"""The probes in the order of the report, and the label of each."""

MAX_SHOWN = 16
"""The most values of a list in the report."""


def run(config: EvaluateConfig) -> JsonObject:
    """Measure the model and write figures and pictures to ``config.output``.

    The figures of a registered model are also recorded with its version. Raises UserError if the
    model, the data set or the split does not exist, or the images have another shape.
    """
    from pipeline.evaluation.evaluation import evaluate
    from pipeline.registry.models import open_model

    model = open_model(config.model, config.registry, config.storage)

    def connect() -> None:
        from pipeline import cluster  # which imports Ray: only if there is much to measure

        cluster.connect(config.cluster, config.storage)

    result = evaluate(config, model, connect)
    if model.version:
        from pipeline.registry.versions import Registry  # which imports MLflow

        name, number = model.version
        measured = result[config.split]
        Registry(config.registry).log_evaluation(name, number, config.split, measured)
    return result


def format_result(config: EvaluateConfig, result: JsonObject) -> str:
    """The measured figures as text, and the pictures' addresses."""
    pictures = [f"picture: {url}" for url in result["pictures"]]
    return "\n".join([format_report(result, config.split), *pictures])


def format_report(result: JsonObject, split: str) -> str:
    """The measured figures as text."""
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
        share = (
            f"{measured['mutual_information_bits']:.2f} bits, of {math.log2(compared):.2f} that"
            f" tell {compared:,} images apart"
        )
        rows += [
            ("I(x; z), at least", "mutual_information_nats", share),
            ("KL(q(z) || p(z)), at most", "marginal_kl_nats", "rate less I(x; z)"),
        ]
    architecture = vlae.describe(result["architecture"])
    images = f"{measured['num_images']:,} {split} images"
    if not result["held_out"]:
        images += " that the model was trained on"
    lines = [f"{architecture}; {images}, nats per image:"]
    lines += [
        f"  {label:<26}{Measured.from_json(measured, key).text(3):<20}{extra}".rstrip()
        for label, key, extra in rows
    ]
    if "nested" in measured:
        lines += [
            "codes cut to their first latents:",
            "  latents   rate, bits   distortion, nats   code length, nats   linear probe, %  "
            " resolution, px",
            *map(_format_cut, measured["nested"]),
        ]
    latents = measured["latents"]
    lines.append(
        f"{measured['active_units']} of {len(latents['code_variance'])} latents are active"
    )
    if "capacity_bits" in latents:
        lines[-1] += f"; the capacity of each in bits, {measured['capacity_bits']:.2f} in total:"
        lines.append(_format_list(sorted(latents["capacity_bits"], reverse=True)))
    if "group_rate_bits" in latents:
        lines += [
            "rate of each group of latents, in bits:",
            _format_list(latents["group_rate_bits"]),
        ]
    if "resolution" in measured:
        lines.append(f"resolution: {format_resolution(measured)}")
    if "probe_skipped" in measured:
        lines.append(f"no probe: {measured['probe_skipped']}")
    if "probe" in measured:
        note = SPLIT_NOTES.get(split, "")
        labelled, total = measured.get("probe_labelled"), measured["num_images"]
        if labelled is not None and labelled < total:
            note += f", on the {labelled:,} of {total:,} images that have a label"
        lines.append(f"class predicted from the code, accuracy in %{note}:")
        for name, label in PROBES.items():
            probe = measured["probe"][name]
            extra = (
                f"{100 * probe['valid_accuracy']:.2f} on valid"
                if "valid_accuracy" in probe
                else "most frequent in training"
            )
            accuracy = Measured.from_json(probe, "accuracy").percent.text()
            lines.append(f"  {label:<26}{accuracy:<20}{extra}")
    return "\n".join(lines)


def _format_cut(row: JsonObject) -> str:
    """A row of the table of codes that are cut."""
    figures = [Measured.from_json(row, f"{name}_nats").text() for name in ("distortion", "elbo")]
    probe, resolution = "", ""
    if "linear_accuracy" in row:
        probe = Measured.from_json(row, "linear_accuracy").percent.text(1)
    if "resolution_px" in row:
        figure = Measured.from_json(row, "resolution_px")
        resolution = "none" if row["resolution_px"] is None else figure.text()
    distortion, length = figures
    rate = f"{row['rate_bits']:.2f}"
    line = f"  {row['latents']:<10}{rate:<13}{distortion:<19}{length:<20}{probe:<18}{resolution}"
    return line.rstrip()


def format_resolution(measured: JsonObject) -> str:
    """What structure the code keeps, in a sentence."""
    curve, figure = measured["resolution"], Measured.from_json(measured, "resolution_px")
    if measured["resolution_px"] is None:
        return "none; the code decides less than half of the variance of every size"
    if measured["resolution_px"] == curve["finest_px"]:
        kept = f"{figure.value:.2f} px, the finest structure that pixels show"
    else:
        kept = f"{figure}; the code keeps coarser structure, and finer is redrawn"
    if curve["lost_px"]:
        sizes = ", ".join(f"{px:.1f}" for px in curve["lost_px"])
        kept += f" (structure of {sizes} px is redrawn, too)"
    return kept


def _format_list(values: list[float]) -> str:
    """The first ``MAX_SHOWN`` values."""
    shown = " ".join(f"{value:.2f}" for value in values[:MAX_SHOWN])
    return f"  {shown}{' ...' if len(values) > MAX_SHOWN else ''}"


COMMAND = Command(EvaluateConfig, run, format_result, lambda config: config.output, resumes=True)
