"""Soft free bits: a weight of the rate that is steered so that the code carries at least so many nats."""

import torch
from torch import Tensor


class SoftFreeBits:
    """Steers gamma in (0, 1], the weight of the rate in the loss, so that the rate comes down to ``target`` nats and stays there.

        loss = distortion + gamma * rate

    Every ``INTERVAL`` steps gamma is lowered by 10 % if the rate is below its target, and raised by 10 % if it is more than 5 % above.
    At gamma = 1 the loss is the code length itself: a target below the rate that the model would choose by itself changes nothing in
    the end. Unlike the hard floor there is no kink in the loss, and the rate's gradient never vanishes.

    The paper does not say how often gamma changes, nor what rate it looks at. A mini-batch's own rate is noisy, so it is averaged over
    about ``INTERVAL`` steps. If gamma changes at every step it swings widely, if it waits for 20 it follows too late and overshoots.

    All of it is tensors on ``device``, which is never waited for. ``state_dict`` is part of a run's state.

    Reference: Chen et al., *Variational Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731, appendix C.
    """

    FACTOR = 1.1
    TOLERANCE = 0.05
    INTERVAL = 5

    def __init__(self, target: float, device: torch.device | None = None) -> None:
        self.target = target
        self.gamma = torch.ones((), device=device)
        self.rate = torch.full((), target, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, mean_rate: Tensor) -> None:
        """Take in a step's rate in nats, averaged over the global batch: a scalar without gradient.

        One that is not finite is passed over.
        """
        finite = mean_rate.isfinite()
        self.steps = self.steps + finite
        self.rate = torch.where(finite, self.rate.lerp(mean_rate.to(self.rate), 1 / self.INTERVAL), self.rate)
        high, low = self.rate > (1 + self.TOLERANCE) * self.target, self.rate < self.target
        changed = torch.where(high, self.gamma * self.FACTOR, torch.where(low, self.gamma / self.FACTOR, self.gamma))
        due = finite & (self.steps % self.INTERVAL == 0)
        self.gamma = torch.where(due, changed.clamp(max=1.0), self.gamma)

    def state_dict(self) -> dict[str, Tensor]:
        return {"gamma": self.gamma, "rate": self.rate, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.gamma, self.rate, self.steps = (state[name].to(self.gamma.device) for name in ("gamma", "rate", "steps"))
