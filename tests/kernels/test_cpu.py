"""The native kernels: every instruction set, any company of rows, any number of threads, and life without them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import (
    B,
    H,
    assert_equal,
    error,
    mlstm_inputs,
    mlstm_state,
    normal,
    random_flags,
    slstm_inputs,
    slstm_results,
    slstm_state,
)

from openxlstm import kernels
from openxlstm.cells import mlstm, mLSTMState, slstm, sLSTMState
from openxlstm.kernels import cpu
from openxlstm.kernels.cpu import library, ops
from openxlstm.kernels.dispatch import Call

FOUND = library.native()
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_library = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
ISAS = [] if isinstance(FOUND, str) else [library.Native(FOUND.library, isa) for isa in range(FOUND.isa + 1)]


def isas(function):  # a decorator: once for each instruction set of this machine
    return needs_library(pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)(function))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here, so the installation could not build the library")
def test_where_there_is_a_compiler_there_are_native_kernels() -> None:
    """Every other test of this file is skipped without the library: this one says that it must not be missing."""
    assert not isinstance(FOUND, str), FOUND


@isas
@pytest.mark.parametrize("name", ["exp", "log1p", "tanh", "sigmoid"])
def test_functions_are_accurate_to_two_units_in_the_last_place(isa: library.Native, name: str) -> None:
    wide = torch.cat([torch.linspace(-87, 87, 40_001), torch.logspace(-9, 0, 4_001), -torch.logspace(-9, 0, 4_001)])
    x = wide[(wide >= 0) & (wide <= 1)] if name == "log1p" else wide
    x = x[x > -80] if name == "sigmoid" else x  # below, the result is no normal number
    got, want = isa.function(name, x).double(), getattr(torch, name)(x.double())
    wrong = ((got - want).abs() / want.abs().clamp_min(1e-37)).max().item()
    assert wrong < 2 * 2**-23, f"{name}: {wrong / 2**-23:.2f} units"
    assert isa.function(name, torch.tensor([torch.nan])).isnan().all()
    ends = isa.function(name, torch.tensor([0.0, 1.0] if name == "log1p" else [-1e30, 1e30, -torch.inf, torch.inf]))
    assert torch.isfinite(ends).all()


@isas
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("K", [1, 3, 16, 17, 33, 64, 80])
def test_every_instruction_set_is_the_definition(
    isa: library.Native, K: int, forget_gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_library", lambda: isa)
    for T in (2, 15, 40):
        x, state = slstm_inputs(T, K=K, dtype=torch.float32), slstm_state(K=K, dtype=torch.float32)
        with torch.no_grad():
            x[1] *= 0.3
            x[0][:, :, 1] -= 2.0 if forget_gate == "exp" else 0.0
        double = [p.detach().double().requires_grad_() for p in x]
        state64 = state.map(lambda p: p.detach().double().requires_grad_())
        for flags in ({}, random_flags(T), {"reset": torch.ones(B, T, dtype=torch.bool)}):
            want = slstm_results(slstm.recurrent, double, state64, forget_gate=forget_gate, **flags)
            got = slstm_results(kernels.slstm, x, state, forget_gate=forget_gate, **flags, backend="cpu")
            assert_equal(got, want, 4e-5, f"{isa.name}, T={T}, K={K}, {list(flags)}")


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_notice_its_company_nor_the_threads(
    isa: library.Native, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits, forward and backward: rows share registers in blocks of up to six, and this may not show."""
    monkeypatch.setattr(ops, "_library", lambda: isa)
    rows, T, K = 13, 9, 40
    gates = normal(rows, T, 4, H, K).to(dtype).requires_grad_()
    R, b = normal(H, K, 4, K, std=0.1).to(dtype), normal(4, H, K).to(dtype)
    whole, _ = kernels.slstm(gates, R, b, backend="cpu")
    (gradient,) = torch.autograd.grad(whole.float().square().sum(), gates)
    for count in (1, 2, 3, 5, 6, 7):
        part = gates.detach()[:count].clone().requires_grad_()
        got, _ = kernels.slstm(part, R, b, backend="cpu")
        assert torch.equal(got, whole[:count]), count
        assert torch.equal(torch.autograd.grad(got.float().square().sum(), part)[0], gradient[:count]), count
    for threads in (2, 3, 16):
        monkeypatch.setattr(ops, "threads", lambda threads=threads: threads)
        again, _ = kernels.slstm(gates, R, b, backend="cpu")
        assert torch.equal(again, whole)
        assert torch.equal(torch.autograd.grad(again.float().square().sum(), gates)[0], gradient)


@needs_library
def test_a_step_is_a_sequence_of_one_and_changes_no_argument() -> None:
    gates, R, b = (p.detach() for p in slstm_inputs(5, K=20, dtype=torch.float32))
    state = slstm_state(K=20, dtype=torch.float32).detach()
    inputs = [gates, R, b, *state.tensors()]
    versions, copies = [x._version for x in inputs], [x.clone() for x in inputs]
    whole, end = kernels.slstm(gates, R, b, state, backend="cpu")
    now, steps = state, []
    for t in range(5):
        h, now = kernels.slstm_step(gates[:, t], R, b, now, backend="cpu")
        steps.append(h)
    assert torch.equal(torch.stack(steps, 1), whole)
    assert all(torch.equal(x, y) for x, y in zip(now.tensors(), end.tensors(), strict=True))
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@needs_library
def test_extreme_gates_stay_finite_and_nan_stays_visible() -> None:
    for size in (200.0, 1e4):
        gates = torch.empty(2, 6, 4, H, 5).uniform_(-size, size).requires_grad_()
        R, b = torch.zeros(H, 5, 4, 5), torch.zeros(4, H, 5)
        h, end = kernels.slstm(gates, R, b, backend="cpu")
        assert torch.isfinite(h).all()
        assert all(torch.isfinite(part).all() for part in end.tensors())
        assert torch.isfinite(torch.autograd.grad(h.sum(), gates)[0]).all()
    for gate in range(4):
        gates = torch.zeros(1, 3, 4, H, 5)
        gates[0, 1, gate, 0, 2] = torch.nan
        h, _ = kernels.slstm(gates, torch.zeros(H, 5, 4, 5), torch.zeros(4, H, 5), backend="cpu")
        assert h[0, 1, 0, 2].isnan(), f"gate {gate}"
        assert torch.isfinite(h[0, 0]).all()
        mask = torch.tensor([[True, False, True]])
        h, _ = kernels.slstm(gates, torch.zeros(H, 5, 4, 5), torch.zeros(4, H, 5), mask=mask, backend="cpu")
        assert torch.isfinite(h).all(), "a NaN where no step exists"


@needs_library
def test_strange_shapes_and_views() -> None:
    none = kernels.slstm(torch.zeros(0, 4, 4, 2, 5), torch.zeros(2, 5, 4, 5), torch.zeros(4, 2, 5), backend="cpu")
    assert none[0].shape == (0, 4, 2, 5)
    gates, R, b = (p.detach() for p in slstm_inputs(9, K=10, dtype=torch.float32))
    wide = normal(B, 9, 4, H, 20).float()
    wide[..., ::2] = gates
    swapped = gates.transpose(1, 3).contiguous().transpose(1, 3)
    want = kernels.slstm(gates, R, b, backend="cpu")[0]
    assert torch.equal(kernels.slstm(wide[..., ::2], R, b, backend="cpu")[0], want)
    assert torch.equal(kernels.slstm(swapped, R, b, backend="cpu")[0], want)


@needs_library
def test_operators_keep_their_promises_to_the_compiler() -> None:
    gates, R, b = slstm_inputs(4, K=5, dtype=torch.float32)
    state = slstm_state(K=5, dtype=torch.float32)
    args = (gates, R, b, state.h, state.c, state.n, state.m.detach(), None, None, "sigmoid", True)
    torch.library.opcheck(torch.ops.openxlstm_cpu.slstm.default, args, test_utils=("test_schema", "test_faketensor"))


@needs_library
def test_second_derivatives_are_refused() -> None:
    gates, R, b = slstm_inputs(4, K=5, dtype=torch.float32)
    h, _ = kernels.slstm(gates, R, b, backend="cpu")
    (first,) = torch.autograd.grad(h.square().sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"device": "cuda"}, "the tensors are on cuda"),
        ({"op": "mlstm", "forget_gate": "exp"}, "an exponential forget gate"),
        ({"op": "mlstm_step"}, "one step with gradients"),
        ({"op": "mlstm_step", "needs_grad": False, "input_gate": "sigmoid"}, "other gates"),
        ({"op": "slstm_step"}, "one step with gradients"),
        ({"dtype": torch.float16}, "float16 is served by torch"),
    ],
)
def test_what_it_cannot_do_it_says(facts: dict, sentence: str) -> None:
    call = {"op": "slstm", "device": "cpu", "dtype": torch.float32, "K": 8, "V": 8, "needs_grad": True} | facts
    assert sentence in (cpu.refuses(Call(**call)) or "")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_without_the_library_torch_serves_and_says_why() -> None:
    """As on a machine where nothing could be compiled: the file is not there when the package is imported."""
    code = (
        "from pathlib import Path\nexists = Path.exists\n"
        "Path.exists = lambda self, **how: self.suffix != '.so' and exists(self, **how)\n"
        "import torch\nfrom openxlstm import kernels\n"
        "h, _ = kernels.slstm(torch.zeros(1, 3, 4, 1, 2), torch.zeros(1, 2, 4, 2), torch.zeros(4, 1, 2))\n"
        "print(h.shape, kernels.explain('cpu'))\n"
    )
    done = run(code)
    assert "torch.Size([1, 3, 1, 2])" in done.stdout, done.stderr
    assert "the native library was not built: install openxlstm again where there is a C++ compiler" in done.stdout


@needs_library
def test_the_instruction_set_can_be_forced_and_a_wrong_name_is_refused() -> None:
    show = "from openxlstm import kernels; print(kernels.explain('cpu'))"
    assert "baseline instructions" in run(show, OPENXLSTM_ISA="baseline").stdout
    refused = run(show, OPENXLSTM_ISA="avx1024")
    assert refused.returncode != 0
    assert "OPENXLSTM_ISA='avx1024' must be one of baseline" in refused.stderr


@needs_library
def test_an_instruction_set_that_is_not_there_is_no_crash() -> None:
    assert isinstance(FOUND, library.Native)
    call = library.SlstmForward()
    assert FOUND.library.xl_run_slstm_forward(99, ctypes.byref(call)) == 2
    assert FOUND.library.xl_run_slstm_forward(-1, ctypes.byref(call)) == 2


@needs_library
def test_a_forked_child_runs_on_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        gates = torch.zeros(2, 3, 4, 2, 5)
        kernels.slstm(gates, torch.zeros(2, 5, 4, 5), torch.zeros(4, 2, 5), backend="cpu")
        child = os.fork()
        if child == 0:
            out, _ = kernels.slstm(gates, torch.zeros(2, 5, 4, 5), torch.zeros(4, 2, 5), backend="cpu")
            os._exit(0 if library.threads() == 1 and torch.isfinite(out).all() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(1)


@pytest.mark.compile
@needs_library
def test_it_compiles_whole_for_every_length() -> None:
    def loss(gates, R, b, state):
        h, end = kernels.slstm(gates, R, b, state, backend="cpu")
        return h.square().sum() + end.c.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    state = sLSTMState.empty(B, H, 10)
    for T in (7, 12, 30):
        x = slstm_inputs(T, K=10, dtype=torch.float32)
        got, want = (torch.autograd.grad(form(*x, state), x) for form in (compiled, loss))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@isas
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("K", "V"), [(1, 1), (5, 7), (16, 48), (33, 64), (64, 130)])
def test_a_step_of_the_mlstm_is_the_definition(
    isa: library.Native, K: int, V: int, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_library", lambda: isa)
    x = [p.detach()[:, 0] for p in mlstm_inputs(1, K=K, V=V, dtype=dtype)]
    state = mlstm_state(K=K, V=V, dtype=torch.float32).detach()
    x[0] = x[0].transpose(0, 1).contiguous().transpose(0, 1)  # other strides
    flags = torch.arange(B) % 2 == 0
    copies = [p.clone() for p in (*x, *state.tensors())]
    for options in (
        {},
        {"reset": flags},
        {"mask": flags},
        {"reset": flags, "mask": ~flags},
        {"reset": flags, "mask": flags},
    ):
        want_h, want = mlstm.step(*(p.double() for p in x), state.map(torch.Tensor.double), **options)
        got_h, got = kernels.mlstm_step(*x, state, **options, backend="cpu")
        assert got_h.dtype == dtype
        pairs = [(got_h, want_h), *zip(got.tensors(), want.tensors(), strict=True)]
        assert all(error(one, other) <= limit for one, other in pairs), (isa.name, list(options))
    assert all(torch.equal(p, q) for p, q in zip((*x, *state.tensors()), copies, strict=True))
    alone, _ = kernels.mlstm_step(*(p[:1] for p in x), state.select(torch.tensor([0])), backend="cpu")
    assert torch.equal(alone, kernels.mlstm_step(*x, state, backend="cpu")[0][:1]), "a row notices its company"


@needs_library
def test_a_step_of_the_mlstm_with_extreme_gates_and_nan() -> None:
    shape = (2, H, 6)
    for i, f in ((200.0, -200.0), (-200.0, 200.0), (1e4, 1e4), (-1e4, -1e4)):
        state = mLSTMState.empty(2, H, 6, 6)
        for _ in range(3):
            gates = torch.full((2, H), i), torch.full((2, H), f)
            h, state = kernels.mlstm_step(*(torch.randn(shape) for _ in "qkv"), *gates, state, backend="cpu")
            assert torch.isfinite(h).all()
            assert all(torch.isfinite(part).all() for part in state.tensors())
    for part in range(5):
        x = [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.zeros(2, H), torch.zeros(2, H)]
        x[part][0, 0] = torch.nan
        h, _ = kernels.mlstm_step(*x, mLSTMState.empty(2, H, 6, 6), backend="cpu")
        assert h[0, 0].isnan().any(), part
        assert torch.isfinite(h[1]).all()
        h, after = kernels.mlstm_step(*x, mLSTMState.empty(2, H, 6, 6), mask=torch.tensor([False, True]), backend="cpu")
        assert torch.isfinite(h).all()
        assert all(torch.isfinite(tensor).all() for tensor in after.tensors()), "a NaN where no step exists"


@needs_library
def test_amx_is_used_refused_or_absent_and_the_difference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(FOUND, library.Native)
    answer = FOUND.library.xl_has_amx()
    assert answer in (0, 1, 2)
    assert answer != 1 or FOUND.library.xl_best_isa() in (3, 4), "AMX alone, without AVX-512, is no level of ours"
    assert ("AMX is there" in cpu.about()) == (answer == 2)
    monkeypatch.setattr(library.Native, "refused_amx", True)
    assert "AMX is there, and the operating system does not grant it" in cpu.about()
