"""What a process asks of the machine: its device, threads and allocator."""

import ctypes
import os
import sys

import torch

WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "THP_MEM_ALLOC_ENABLE": "1"}
"""Workers train in a thread of their own, and glibc gives such a thread's freed memory back to the
kernel at every step, whatever ``loop.keep_freed_memory`` asks of it: only the main arena keeps it.
So they have no other. And PyTorch puts the host's large tensors on pages of 2 MB: with those of 4
kB, some per cent of a step on a CPU are spent on looking up pages.
"""


def num_threads(device: torch.device) -> int:
    """How many batches to work on at once: on a CPU as many as this process may use cores.

    OMP_NUM_THREADS says so where it is set, as Ray does for what it starts.
    """
    if device.type == "cuda":
        return 1
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of giving it back to the kernel and
    zeroing it anew.

    Activations are allocated and freed at every step; without this about a quarter of a step on a
    CPU goes to page faults.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(trim_threshold, 1 << 30)
            libc.mallopt(mmap_threshold, 32 << 20)  # glibc takes no more


def device() -> torch.device:
    """Where models are used: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
