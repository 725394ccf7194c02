"""A model's encoder and decoder as graphs: by ``torch.export`` and as ONNX, held to the model.

The encoder's graph maps images to codes. The decoder's is a step of drawing: the parameters of
p(x_ij | z, x_window(ij)) of every pixel (i, j), given the code and all pixels. A pixel's parameters
do not depend on pixels after it, so who draws calls the step again with what is drawn so far. The
batch is dynamic in all of them.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from vlae import VLAE
from vlae.distributions import DiagonalGaussian
from vlae.networks.decoder import Decoder
from vlae.networks.encoder import Encoder

NEEDED = ("onnx", "onnxruntime", "onnxscript")
"""The packages of the extra ``export``."""
TOLERANCE = 1e-5
"""The most by which an output may differ from the model's, as a part of its largest value, or of 1
if that is larger."""
TRACED, HELD = 3, (1, 2, 5)
"""Images in the batch with which a graph is made, and in those by which it is held to the model."""
MAX_BYTES = 1 << 31
"""ONNX files are protocol buffers, which hold at most two gigabytes."""

Compute = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A graph's outputs from its inputs."""


class EncoderGraph(nn.Module):
    """Images -> their codes; and the Gaussian posterior's mean and log scale, if it is one.

    A posterior with a flow gives its code alone: a sample of it takes the flow, too.
    """

    inputs = ("images",)

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.outputs = ("code",) if encoder.flow else ("code", "mean", "log_scale")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        posterior = self.encoder(images)
        if isinstance(posterior, DiagonalGaussian):
            # The code is the mean; a graph needs two tensors for its two names.
            return posterior.code.clone(), posterior.mean, posterior.log_scale
        return (posterior.code,)


class DecoderGraph(nn.Module):
    """Codes and pixels -> the parameters of each pixel's distribution.

    The outputs are the fields of ``vlae.likelihood.Bernoulli`` or ``LogisticMixture``.
    """

    inputs = ("z", "images")

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        parameters = torch.zeros(1, 1, 1, decoder.likelihood.num_parameters)
        self.outputs = tuple(f.name for f in dataclasses.fields(decoder.likelihood(parameters)))  # type: ignore[arg-type]

    def forward(self, z: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        distribution = self.decoder(z, images)
        return tuple(getattr(distribution, name) for name in self.outputs)


@dataclass(frozen=True)
class Written:
    """A graph's files: what goes in and comes out, and how far it is from the model."""

    shapes: Mapping[str, Mapping[str, list[int | str]]]
    """Of ``inputs`` and ``outputs``, by name; "batch" is the dynamic dimension."""
    difference: float
    """The largest difference from the model's outputs; see ``TOLERANCE``."""


def check_installed() -> None:
    """Raise UserError unless the packages that write and run ONNX files are installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"vlae export needs {' and '.join(missing)}: pip install 'vlae-pipeline[export]'"
        )


def write_graphs(model: VLAE, folder: Path) -> dict[str, Written]:
    """Write ``encoder`` and ``decoder``, each as ``.pt2`` and ``.onnx``, into ``folder``.

    Each file is read again and held to the model on batches of other sizes. Raises UserError if a
    graph cannot be made, or differs by more than ``TOLERANCE``.
    """
    graphs: dict[str, EncoderGraph | DecoderGraph] = {
        "encoder": EncoderGraph(model.encoder),
        "decoder": DecoderGraph(model.decoder),
    }
    return {name: _write(name, graph, model, folder) for name, graph in graphs.items()}


def _example(model: VLAE, names: Sequence[str], batch: int) -> tuple[Tensor, ...]:
    """Inputs for a graph: pixels as the likelihood has them, and codes as the prior has them."""
    generator = torch.Generator().manual_seed(batch)
    levels = 2**model.decoder.likelihood.levels - 1
    pixels = torch.rand(batch, *model.image_shape, generator=generator)
    made = {
        "images": torch.round(pixels * levels) / levels,
        "z": torch.randn(batch, model.latents, generator=generator),
    }
    return tuple(made[name] for name in names)


def _write(name: str, graph: EncoderGraph | DecoderGraph, model: VLAE, folder: Path) -> Written:
    """Write one graph, and hold its files to it. Raises UserError."""
    size = sum(value.nbytes for value in graph.state_dict().values())
    if size >= MAX_BYTES:
        raise UserError(
            f"the {name} has {size:,} bytes of weights, and an ONNX file holds {MAX_BYTES:,}; it"
            " cannot be exported"
        )
    program_file, onnx_file = folder / f"{name}.pt2", folder / f"{name}.onnx"
    graph.eval()
    inputs = _example(model, graph.inputs, TRACED)
    dimension = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                graph, inputs, dynamic_shapes=tuple({0: dimension} for _ in inputs)
            )
            torch.export.save(program, program_file)
            converted = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
            )
            assert converted is not None
            converted.save(onnx_file)
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the {name} of this model cannot be exported: {reason}") from error
    _name_batch(onnx_file)
    with torch.no_grad():
        batches = [_example(model, graph.inputs, number) for number in HELD]
        expected = [(batch, graph(*batch)) for batch in batches]
    with _quiet():
        read = {program_file: _program(program_file), onnx_file: _session(onnx_file, graph.inputs)}
    difference = 0.0
    for file, compute in read.items():
        found = max(_difference(compute(batch), outputs) for batch, outputs in expected)
        if not found <= TOLERANCE:
            raise UserError(
                f"{file.name} differs from the model by {found:.1e}, and {TOLERANCE:g} is allowed;"
                " nothing was written"
            )
        difference = max(difference, found)
    outputs = expected[0][1]
    return Written(
        {
            "inputs": _shapes(graph.inputs, inputs),
            "outputs": _shapes(graph.outputs, outputs),
        },
        difference,
    )


def _program(file: Path) -> Compute:
    module = torch.export.load(file).module()

    def compute(batch: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return module(*batch)

    return compute


def _session(file: Path, names: Sequence[str]) -> Compute:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def compute(batch: Sequence[Tensor]) -> Sequence[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, batch, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return compute


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a part of the largest value of that output, or of 1."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        error = (one.double() - other.double()).abs().max().item()
        if error != error:
            return float("inf")
        worst = max(worst, error / max(1.0, other.abs().max().item()))
    return worst


def _shapes(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, list[int | str]]:
    return {name: ["batch", *value.shape[1:]] for name, value in zip(names, values, strict=True)}


def _name_batch(file: Path) -> None:
    """Call the dynamic dimension ``batch``, where PyTorch numbers it."""
    import onnx

    model = onnx.load(file)
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == symbol:
                dimension.dim_param = "batch"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what PyTorch's exporter tells its own developers."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exporter.setLevel(logging.ERROR)
        try:
            yield
        finally:
            exporter.setLevel(level)
