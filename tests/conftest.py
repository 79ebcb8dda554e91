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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured (`record_property("measured", text)`), whichever process they ran in."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "measured" and report.when == "call":
                terminalreporter.write_line(f"measured: {text}")
