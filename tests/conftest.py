"""What every test runs under: one thread, poisoned memory, and the same seed."""

import os

import pytest
import torch

torch.set_num_threads(1)  # tests run in parallel processes; two threads each on two cores fight
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for programs that tests start

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is NaN in every test


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
