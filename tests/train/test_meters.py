"""Rates by a clock that the test turns, FLOPs against PyTorch's counter, and devices that are known or not."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openxlstm.cells import mlstm
from openxlstm.kernels import glue
from openxlstm.models import accounting, xlstm
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.train import gpus
from openxlstm.train.meters import Meters, quantile

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_rates_leave_evaluation_and_saving_out() -> None:
    clock = Clock()
    meters = Meters(1000, CPU, ranks=2, clock=clock)
    for seconds in (1.0, 1.0, 3.0):
        with meters.time("data"):
            clock.wait(0.25)
        with meters.time("forward"):
            clock.wait(seconds - 0.25)
        meters.step(tokens=90, slots=100)
        with meters.time("evaluate"):
            clock.wait(10.0)
    with meters.time("save"):
        clock.wait(5.0)
    line = meters.line(step=3, end=13)
    assert line["tokens_per_second"] == pytest.approx(270 / 5, abs=0.1)
    assert line["tokens_per_second_per_device"] == pytest.approx(27, abs=0.1)
    assert line["utilisation"] == 0.9
    assert line["data_wait"] == pytest.approx(0.75 / 5)
    assert (line["step_p50"], line["step_p95"]) == (1.0, 3.0)
    assert (line["evaluate_seconds"], line["save_seconds"]) == (30.0, 5.0)
    assert line["seconds_left"] == pytest.approx(10 * (1 + 20 / 5)), "so far, 20 s of evaluation beside 5 s of steps"
    assert line["memory"]["resident"] > 10**7
    assert "mfu" not in line, "no peak is known for a CPU"


def test_a_line_begins_a_new_window() -> None:
    clock = Clock()
    meters = Meters(1000, CPU, clock=clock)
    clock.wait(2.0)
    meters.step(10, 10)
    meters.line(1, 9)
    assert meters.since_line == 0
    with meters.time("evaluate"):
        clock.wait(50.0)
    clock.wait(4.0)
    meters.step(20, 20)
    line = meters.line(2, 9)
    assert line["tokens_per_second"] == 5.0
    assert line["step_p50"] == 4.0, "what was done between two steps is not the step's"
    meters.start()
    clock.wait(1.0)
    meters.step(7, 7)
    assert meters.line(3, 9)["tokens_per_second"] == 7.0


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("openxlstm.train.meters.peak_flops", lambda device: 1e6)
    meters = Meters(500, CPU, ranks=4, clock=clock)
    clock.wait(2.0)
    meters.step(tokens=600, slots=800)
    assert meters.line(1, 2)["mfu"] == pytest.approx(3 * 500 * 800 / 2 / 4e6)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_known_by_the_name_of_its_driver(name: str, known: str | None) -> None:
    assert gpus.find(name) is (None if known is None else gpus.GPUS[known])
    assert gpus.peak_flops(CPU) is None


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"gpu='h10' is not known; did you mean 'h100'\?; known: a100, h100"):
        gpus.gpu("h10")


def test_quantiles_are_measured_values() -> None:
    assert quantile([3.0], 0.95) == 3.0
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([float(value) for value in range(1, 101)], 0.95) == 95.0


@pytest.mark.parametrize("pattern", ["m", "s", "msm"])
def test_flops_of_the_paper_s_blocks_equal_what_torch_counts(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything outside the cells, to the last product. Convolutions are elementwise here, not counted by torch."""
    config = xLSTMConfig(vocab_size=11, width=24, heads=3, pattern=pattern, mlstm_width=48, ffn_width=40, conv=4)
    model, T = xLSTM(config), 6
    state = model.empty_state(2).blocks
    memory = {part.cell.__class__.__name__: part.cell for part in state}
    monkeypatch.setattr(glue, "serves", lambda *inputs: False)  # torch counts its own operators only
    monkeypatch.setattr(xlstm.kernels, "mlstm", lambda q, k, v, i, f, state, **options: (v, memory["mLSTMState"]))
    monkeypatch.setattr(
        xlstm.kernels, "slstm", lambda gates, R, b, state, **options: (gates[:, :, 0], memory["sLSTMState"])
    )
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, T, dtype=torch.long))
    m, s = pattern.count("m"), pattern.count("s")
    cells = m * 3 * (4 * 16 * 16 + 64 * 32) + s * 8 * 24 * 8
    convolutions = 2 * 4 * (48 * m + 24 * s)
    assert accounting.flops_per_token(config) - cells - convolutions == counter.get_total_flops() / (2 * T)


def test_flops_of_the_matrix_memory_equal_what_torch_counts_in_the_definition() -> None:
    """The chunkwise form computes whole squares of scores; the formula counts the causal half of them."""
    B, T, H, K, V, L = 1, 128, 2, 64, 96, 64
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    i, f = torch.randn(B, T, H), torch.randn(B, T, H)
    with FlopCounterMode(display=False) as counter:
        mlstm.chunkwise(q, k, v, i, f, chunk=L)
    counted, upper_half = counter.get_total_flops() / (B * T), H * L * (K + V)
    formula = accounting._mlstm_cell(H, K, V, L)
    assert counted - upper_half == pytest.approx(formula, rel=0.03), "the rest is the normaliser and sums of gates"
