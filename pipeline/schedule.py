"""What changes in the course of a run, as functions of the part of it that is done."""

from pipeline.config import FreeBits, OptimOptions, TrainOptions

FREE_NATS_RAMP = 0.2
"""The part of a run over which the floor under the rate falls to zero."""


def learning_rate(optim: OptimOptions, train: TrainOptions, step: int) -> float:
    """Rises over ``warmup_steps``, stays, and falls to zero over the last ``decay_fraction`` of the run; ``step`` counts from 0."""
    rise = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    fall = min(1.0, (1 - step / train.num_steps) / optim.decay_fraction) if optim.decay_fraction else 1.0
    return optim.learning_rate * rise * fall


def free_nats(train: TrainOptions, step: int) -> float:
    """The floor under the rate: ``free_nats`` during ``free_fraction`` of the run, then falling to zero over the next fifth.

    There is none with soft free bits.
    """
    if train.free_bits is FreeBits.soft:
        return 0.0
    beyond = step / train.num_steps - train.free_fraction
    return train.free_nats * min(1.0, max(0.0, 1 - beyond / FREE_NATS_RAMP))


def rate_weight(train: TrainOptions, step: int) -> float:
    """The weight of the rate in the loss: from 0 to 1 over the first ``rate_warmup_fraction`` of the run."""
    if not train.rate_warmup_fraction:
        return 1.0
    return min(1.0, step / (train.rate_warmup_fraction * train.num_steps))
