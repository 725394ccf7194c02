"""A process's device, number of threads, and memory allocator."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes of this machine's memory."""
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "THP_MEM_ALLOC_ENABLE": "1"}
"""Environment variables of the workers.

MALLOC_ARENA_MAX: workers train in a thread other than the main one. For such a thread glibc returns
freed memory to the kernel at every step, whatever ``keep_freed_memory`` requests: only the main
arena keeps it. So the main arena is made the only one.

THP_MEM_ALLOC_ENABLE: PyTorch puts large host tensors on pages of 2 MB. With pages of 4 kB, a few
per cent of a step on a CPU are page table lookups.
"""


def num_threads(device: "torch.device") -> int:
    """The number of batches to process at once: one on a GPU, else one for each available core.

    OMP_NUM_THREADS overrides the number of cores; Ray sets it for its workers.
    """
    if device.type == "cuda":
        return 1
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    return num_cores()


def num_cores() -> int:
    """The processor cores that this process may use, by its affinity and its container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # "max 100000" where there is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, -(-quota // period))
    return max(1, cores)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, instead of returning it to the kernel.

    Activations are allocated and freed at every step. Without this, about a quarter of a step on a
    CPU is spent on page faults.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(trim_threshold, 1 << 30)
            libc.mallopt(mmap_threshold, 32 << 20)  # the largest that glibc accepts


def device() -> "torch.device":
    """The device that models run on: a GPU if there is one.

    Its float32 is float32: by default PyTorch's convolutions round their inputs to 10 bits there
    (TF32), and figures would not be those of a CPU.
    """
    import torch  # here, since programs without a model import this module, too

    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
