"""bf16 is used where the processor has it, and refused by name where it would only be emulated."""

import pytest
import torch

from openxlstm.train import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "has", "got"), [("fp32", True, "fp32"), ("auto", True, "bf16"), ("auto", False, "fp32")]
)
def test_precision_follows_the_wish_and_the_processor(
    wanted: str, has: bool, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_has_bf16", lambda device: has)
    assert machine.precision(wanted, CPU) == got


def test_emulated_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_bf16", lambda device: False)
    with pytest.raises(ValueError, match=r'train\.precision = "bf16" needs bf16 instructions .*"auto" uses them'):
        machine.precision("bf16", CPU)


def test_the_processor_can_be_asked_and_described() -> None:
    assert machine._has_bf16(CPU) in (True, False)
    assert machine.describe(CPU)["threads"] == torch.get_num_threads()
