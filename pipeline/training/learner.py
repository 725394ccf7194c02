"""A model in training: all of its state, and what one step does to it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import vlae
from pipeline.config.run import FreeBits, Precision, TrainConfig
from pipeline.data.batch import Batch, binarize
from pipeline.evaluation.moments import sum_over_ranks
from pipeline.noise import Purpose, normal
from pipeline.training import optimizer
from pipeline.training.checkpoint import Stateful
from pipeline.training.optimizer import Guard
from pipeline.training.optimizer import make as make_optimizer


class Learner:
    """The model, its average, its optimizer and all else that goes on where it was, on one rank of
    ``world_size``.

    ``learn`` takes one step; nothing in it asks the device for a value, so that a GPU is not made
    to wait.
    """

    def __init__(
        self,
        config: TrainConfig,
        image_shape: tuple[int, int, int],
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.world_size, self.device = config, world_size, device
        optim, train = config.optim, config.train
        self.dtype = torch.float64 if train.precision is Precision.float64 else torch.float32
        self.autocast = train.precision is Precision.bfloat16 or (
            train.precision is Precision.auto
            and device.type == "cuda"
            and torch.cuda.is_bf16_supported()
        )
        largest = -(-train.num_streams // world_size) * (train.global_batch // train.num_streams)
        self.splits = (
            train.micro_batch is not None and train.micro_batch < largest
        )  # on all ranks, if on any: see backward
        torch.manual_seed(train.seed)
        self.model = config.build(image_shape).to(device, self.dtype)
        self.weights = vlae.flatten(self.model)
        self.ema = vlae.EMA(self.model, optim.ema_decay)
        self.optimizer, self.guard = make_optimizer(optim, self.weights), Guard(device)
        self.soft = (
            vlae.SoftFreeBits(train.free_nats, device) if train.free_bits is FreeBits.soft else None
        )
        self.network: vlae.VLAE | DistributedDataParallel = self.model
        if world_size > 1:
            self.network = DistributedDataParallel(self.model, forward_sync_buffers=False)

    @property
    def state(self) -> dict[str, Stateful]:
        """Everything that a checkpoint holds, by name."""
        state: dict[str, Stateful] = {
            "model": self.model,
            "ema": self.ema,
            "optimizer": self.optimizer,
            "guard": self.guard,
        }
        return state | ({"free_bits": self.soft} if self.soft else {})

    def settings(self, step: int) -> dict[str, float]:
        """What is scheduled for a step, by name. This waits for the device."""
        train = self.config.train
        weight = float(self.soft.gamma) if self.soft else optimizer.rate_weight(train, step)
        return {
            "train/learning_rate": optimizer.learning_rate(self.config.optim, train, step),
            "train/rate_weight": weight,
        }

    def learn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Take the step ``batch.step`` on this rank's part of its global batch, together with the
        other ranks.

        Returns this rank's part of the mean distortion over the global batch (those of all ranks
        add up to it), and its mean rate, in nats per image; and whether the step was taken, or
        skipped as its gradients were not finite.
        """
        train = self.config.train
        x = binarize(batch, self.config.dataset.binarization, train.seed)
        noise = torch.from_numpy(
            normal((Purpose.POSTERIOR, train.seed), batch.positions, self.model.latents)
        )
        return self.step(
            x.to(self.device, self.dtype, non_blocking=True),
            noise.to(self.device, self.dtype, non_blocking=True),
            batch.step,
        )

    def step(self, x: Tensor, noise: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take step ``number``, counted from 0, on given images and noise; returns what ``learn``
        does.

        ``x`` is this rank's part of the global batch, (local_batch, channels, height, width), and
        ``noise`` is standard normal, (local_batch, latents).
        """
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.learning_rate(optim, self.config.train, number)
        self.optimizer.zero_grad(set_to_none=False)
        distortion, rates = self.backward(x, noise, number)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, optim.clip_norm)
        taken = self.guard.step(self.optimizer, norm, rates)
        self.ema.update(self.weights, number + 1)
        if self.soft:
            self.soft.update(rates.sum())
        return distortion, rates.sum(), taken

    def backward(self, x: Tensor, noise: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Give the weights the gradient of the loss over the global batch; returns distortion and
        rates as ``learn`` does.

        The loss wants the mean rates of the whole global batch (``vlae.training_loss``). If each
        rank's part of it is one micro-batch, its forward pass has them; else a pass of its own
        finds them first, without gradient, through encoder and prior alone. All ranks do the one or
        the other, for they have to meet in the same order, and DDP, too, may have them meet in a
        forward pass.
        """
        train, size = self.config.train, self.config.train.micro_batch or len(x)
        weight = self.soft.gamma if self.soft else optimizer.rate_weight(train, step)
        micro_batches = list(zip(x.split(size), noise.split(size), strict=True))
        rates, distortion = None, x.new_zeros(())
        if self.splits:
            with torch.no_grad(), self._autocast():
                per_latent = torch.cat(
                    [self.model.rate_per_latent(*each) for each in micro_batches]
                )
            rates = sum_over_ranks(self._part(vlae.group_rates(per_latent, train.free_groups), x))
        for number, (images, codes) in enumerate(micro_batches, 1):
            with self._local() if number < len(micro_batches) else nullcontext():
                with self._autocast():
                    bound = self.network(images, codes)
                if rates is None:
                    rates = sum_over_ranks(
                        self._part(
                            vlae.group_rates(bound.rate_per_latent.detach(), train.free_groups), x
                        )
                    )
                loss = vlae.training_loss(bound, rates, optimizer.free_nats(train, step), weight)
                # DDP averages over the ranks, of which one may have more images than another; their
                # parts have to be summed.
                self._part(loss * self.world_size, images).backward()
            distortion += self._part(bound.distortion.detach().mean(), images)
        assert rates is not None
        return distortion, rates

    def _part(self, mean: Tensor, images: Tensor) -> Tensor:
        """What the mean over some images contributes to the mean over the global batch."""
        return mean * (len(images) / self.config.train.global_batch)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _local(self) -> AbstractContextManager[object]:
        """Leave gradients on this rank, for the last micro-batch to send their sum."""
        return (
            self.network.no_sync()
            if isinstance(self.network, DistributedDataParallel)
            else nullcontext()
        )
