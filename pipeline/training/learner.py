"""A model in training: its state, and the training step."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import vlae
from pipeline.config.run import FreeBits, Precision, TrainConfig
from pipeline.data.batch import Batch, binarize
from pipeline.evaluation.moments import sum_over_ranks
from pipeline.noise import Purpose, normal, uniform
from pipeline.training import optimizer
from pipeline.training.checkpoint import Stateful
from pipeline.training.optimizer import Guard
from pipeline.training.optimizer import make as make_optimizer


class Learner:
    """The state of a run on one of ``world_size`` ranks: the model, its average, the optimizer.

    ``learn`` takes one step. It never reads a value from the device, so that a GPU does not wait
    for the host.
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
        # The same on all ranks: see backward.
        self.splits = train.micro_batch is not None and train.micro_batch < largest
        torch.manual_seed(train.seed)
        self.model = config.build(image_shape).to(device, self.dtype)
        self.weights = vlae.flatten(self.model)
        self.ema = vlae.EMA(self.model, optim.ema_decay)
        self.optimizer = make_optimizer(optim, self.weights, self.model.hidden_weights())
        self.guard = Guard(device)
        self.soft = (
            vlae.SoftFreeBits(train.free_nats, device) if train.free_bits is FreeBits.soft else None
        )
        self.network: vlae.VLAE | DistributedDataParallel = self.model
        if world_size > 1:
            self.network = DistributedDataParallel(self.model, forward_sync_buffers=False)

    @property
    def state(self) -> dict[str, Stateful]:
        """The parts of a checkpoint, by name."""
        state: dict[str, Stateful] = {
            "model": self.model,
            "ema": self.ema,
            "optimizer": self.optimizer,
            "guard": self.guard,
        }
        return state | ({"free_bits": self.soft} if self.soft else {})

    def settings(self, step: int) -> dict[str, float]:
        """The scheduled values of a step, by name. This waits for the device."""
        train = self.config.train
        weight = float(self.soft.gamma) if self.soft else optimizer.rate_weight(train, step)
        return {
            "train/learning_rate": optimizer.learning_rate(self.config.optim, train, step),
            "train/rate_weight": weight,
        }

    def learn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Take the step ``batch.step``, together with the other ranks.

        ``batch`` is this rank's part of the global batch. Returns, as tensors on the device:

        - this rank's share of the mean distortion over the global batch, in nats per image (the
          shares of all ranks add up to it);
        - the mean rate over the global batch, in nats per image;
        - whether the step was taken; it is skipped if the gradients are not finite.
        """
        train = self.config.train
        x = binarize(batch, self.config.dataset.binarization, train.seed)
        noise = torch.from_numpy(
            normal((Purpose.POSTERIOR, train.seed), batch.positions, self.model.latents)
        )
        sent = None
        if train.nested:
            drawn = uniform((Purpose.SENT, train.seed), batch.positions, 1)[:, 0]
            sent = vlae.draw_sent(torch.from_numpy(drawn), self.model.latents)
            sent = sent.to(self.device, non_blocking=True)
            noise = noise.expand(2, -1, -1)
        return self.step(
            x.to(self.device, self.dtype, non_blocking=True),
            noise.to(self.device, self.dtype, non_blocking=True),
            batch.step,
            sent,
        )

    def step(
        self, x: Tensor, noise: Tensor, number: int, sent: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take step ``number``, counted from 0, on given images and noise; returns what ``learn``
        does.

        ``x`` is this rank's part of the global batch, (local_batch, channels, height, width), and
        ``noise`` is standard normal, (local_batch, latents), or (codes, local_batch, latents) for
        several codes of each image, over which all means are taken. ``sent`` is how many latents of
        each code are sent, (codes, local_batch); by default all.
        """
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.learning_rate(optim, self.config.train, number)
        self.optimizer.zero_grad(set_to_none=False)
        distortion, rates = self.backward(x, noise, number, sent)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, optim.clip_norm)
        with self._autocast():  # for the matrix products of Muon
            taken = self.guard.step(self.optimizer, norm, rates)
        self.ema.update(self.weights, number + 1)
        if self.soft:
            self.soft.update(rates.sum())
        return distortion, rates.sum(), taken

    def backward(
        self, x: Tensor, noise: Tensor, step: int, sent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradient of the loss over the global batch.

        Returns this rank's share of the mean distortion, and the mean rate of each group over the
        global batch.

        The loss needs the mean rates of the whole global batch (``vlae.training_loss``). If each
        rank's part is a single micro-batch, its forward pass gives them. Otherwise an extra pass
        through encoder and prior, without gradient, computes them first. All ranks must take the
        same branch: collectives must be issued in one order, and DDP may communicate in the forward
        pass.
        """
        train, size = self.config.train, self.config.train.micro_batch or len(x)
        weight = self.soft.gamma if self.soft else optimizer.rate_weight(train, step)
        parts = [None] * math.ceil(len(x) / size) if sent is None else sent.split(size, -1)
        micro_batches = list(zip(x.split(size), noise.split(size, -2), parts, strict=True))
        rates, distortion = None, x.new_zeros(())
        if self.splits:
            with torch.no_grad(), self._autocast():
                per_latent = torch.cat(
                    [self.model.rate_per_latent(*each) for each in micro_batches], -2
                )
            rates = sum_over_ranks(self._part(vlae.group_rates(per_latent, train.free_groups), x))
        for number, (images, codes, kept) in enumerate(micro_batches, 1):
            with self._local() if number < len(micro_batches) else nullcontext():
                with self._autocast():
                    bound = self.network(images, codes, kept)
                if rates is None:
                    rates = sum_over_ranks(
                        self._part(
                            vlae.group_rates(bound.rate_per_latent.detach(), train.free_groups), x
                        )
                    )
                loss = vlae.training_loss(bound, rates, optimizer.free_nats(train, step), weight)
                # DDP averages over the ranks. Ranks may have different numbers of images, so their
                # shares must be summed instead.
                self._part(loss * self.world_size, images).backward()
            distortion += self._part(bound.distortion.detach().mean(), images)
        assert rates is not None
        return distortion, rates

    def _part(self, mean: Tensor, images: Tensor) -> Tensor:
        """The share of the mean over the global batch that the mean over some images makes up."""
        return mean * (len(images) / self.config.train.global_batch)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _local(self) -> AbstractContextManager[object]:
        """Accumulate gradients on this rank; the last micro-batch synchronises their sum."""
        return (
            self.network.no_sync()
            if isinstance(self.network, DistributedDataParallel)
            else nullcontext()
        )
