"""``vlae theory``: test the theory on images whose entropy is known. It needs no Ray."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.options import option
from pipeline.values import JsonObject, Measured

DECODERS = ("factorized", "covering", "full")


@dataclass
class TheoryConfig:
    """Test the theory on images of known entropy: how much do three decoders leave to the code?"""

    images: int = option("fresh images that each decoder is trained on", 120_000, at_least=32)
    num_images: int = option(
        "held-out images that it is measured on", 10_000, at_least=2, below=1 << 24
    )
    seed: int = option(
        "determines the images, the initial weights and all noise", 0, at_least=0, below=1 << 60
    )
    output: str = option(
        "folder of the figures, the picture and the models", "outputs/theory", path=True
    )


def run(config: TheoryConfig) -> JsonObject:
    """Train and measure the three decoders, and draw the figure.

    Raises UserError if the output cannot be written, or if the gradients do not stay finite.
    """
    from pipeline.training.theory import Experiment, experiment

    return experiment(Experiment(**vars(config)))


def format_result(config: TheoryConfig, result: JsonObject) -> str:
    """The figures in nats, as text."""
    entropy, information = result["entropy"], result["global_information"]
    lines = [
        "nats per image:",
        f"  entropy H             {_text(result, 'entropy')}",
        f"    texture H(x|c)      {result['entropy_given_class']:.3f} (exact)",
        (
            f"    global I(c; x)      {_text(result, 'global_information')}: which of"
            f" {result['classes']} patterns"
        ),
        *(
            f"  best C without z      {length:.3f} (exact) for the {name} decoder,"
            f" {100 * (length / entropy - 1):.1f} % above H"
            for name, length in result["without_z"].items()
        ),
        "",
        (
            f"  {'decoder':<12}{'window':<8}{'rate R':<18}{'distortion D':<20}"
            f"{'code length C':<20}C - H"
        ),
    ]
    for name in DECODERS:
        row = result[name]
        lines.append(
            f"  {name:<12}{row['window']:<8}{_text(row, 'rate'):<18}"
            f"{_text(row, 'distortion'):<20}"
            f"{_text(row, 'code_length'):<20}{_text(row, 'excess')}"
        )
    lines.append("")
    for name in DECODERS:
        row = result[name]
        lines.append(
            f"  {name + ':':<12}R is {row['rate'] / information:.2f} of the global information, "
            f"C - H is {100 * row['excess'] / entropy:.2f} % of H"
        )
    made = " (made before)" if result["reused"] else ""
    return "\n".join([*lines, f"figure{made}: {result['figure']}"])


def _text(figures: JsonObject, key: str) -> str:
    return Measured.from_json(figures, key).text(3)


COMMAND = Command(TheoryConfig, run, format_result, lambda config: config.output, resumes=True)
