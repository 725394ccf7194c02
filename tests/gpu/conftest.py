"""What only a GPU can show; skipped where PyTorch has none.

``VLAE_GPU_TESTS=cpu`` runs these tests on the CPU, which shows that they run, and no more.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device under test."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("VLAE_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    pytest.skip("PyTorch finds no GPU; VLAE_GPU_TESTS=cpu tries these tests on the CPU")
