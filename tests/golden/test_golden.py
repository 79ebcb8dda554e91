"""A refactoring shows the same ten losses and the same gradients before and after, to the last digits of float64."""

import pytest
import torch
from golden.trajectory import MODELS, read, run


@pytest.mark.parametrize("name", list(MODELS))
def test_the_recorded_trajectory_is_repeated(name: str) -> None:
    start, recorded = read(name)
    found = run(name, start)
    assert found.keys() == recorded.keys()
    torch.testing.assert_close(found["losses"], recorded["losses"], rtol=1e-9, atol=1e-11)
    for key, want in recorded.items():
        torch.testing.assert_close(found[key], want, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    assert found["losses"][-1] < found["losses"][0]
