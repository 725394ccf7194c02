"""Training on two processes equals training on one: DDP gives the gradient of the whole batch."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from vlae import VLAE, training_loss

WORLD_SIZE = 2


def gradient(
    model: nn.Module, x: Tensor, noise: Tensor, free_nats: float, world_size: int
) -> Tensor:
    bound = model(x, noise)
    mean_rate = bound.rate.detach().mean()
    if world_size > 1:
        dist.all_reduce(mean_rate)
        mean_rate /= world_size
    model.zero_grad()
    training_loss(bound, mean_rate, free_nats, rate_weight=0.7).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


def train_on_one_rank(
    rank: int,
    folder: str,
    models: dict[str, VLAE],
    x: Tensor,
    noise: Tensor,
    free_nats: dict[str, list[float]],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    x, noise = x.chunk(WORLD_SIZE)[rank], noise.chunk(WORLD_SIZE)[rank]
    gradients = {}
    for name, model in models.items():
        replica = nn.parallel.DistributedDataParallel(model)
        gradients[name] = [
            gradient(replica, x, noise, floor, WORLD_SIZE) for floor in free_nats[name]
        ]
    torch.save(gradients, f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one_process_on_the_whole_batch(
    tmp_path: Path, make_model: Callable[..., VLAE]
) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    brightness = torch.linspace(0.2, 0.8, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    x = torch.bernoulli(brightness.expand(-1, 1, 7, 6), generator=generator)
    models = {window: make_model((1, 7, 6), window) for window in ("0x0", "4x2", "full")}
    free_nats: dict[str, list[float]] = {}
    for name, model in models.items():
        rate = model(x, noise).rate.detach()
        low, high = sorted(half.mean().item() for half in rate.chunk(WORLD_SIZE))
        middle, margin = (low + high) / 2, (high - low) / 10
        # Free bits off, inactive, active. In the last two cases the ranks would take different
        # branches if each looked only at its own rate.
        free_nats[name] = [0.0, middle - margin, middle + margin]
        assert low < middle - margin < middle + margin < high

    spawn(train_on_one_rank, (str(tmp_path), models, x, noise, free_nats), nprocs=WORLD_SIZE)
    by_rank = [
        torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)
    ]
    for name, model in models.items():
        for index, floor in enumerate(free_nats[name]):
            expected = gradient(model, x, noise, floor, world_size=1)
            assert expected.any()
            for gradients in by_rank:
                torch.testing.assert_close(gradients[name][index], expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(by_rank[0][name][index], by_rank[1][name][index])
