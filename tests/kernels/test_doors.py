"""Refusals with the value, the rule and the fix; the dispatch table; memory; and the compiler."""

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
from support import B, H, K, V, mlstm_inputs, mlstm_state, normal, random_flags, slstm_inputs, slstm_state
from torch.utils._python_dispatch import TorchDispatchMode

from openxlstm import kernels
from openxlstm.cells import mlstm, mLSTMState, slstm, sLSTMState
from openxlstm.cells.mlstm import INPUT_GATES
from openxlstm.kernels.dispatch import Call, resolve
from openxlstm.kernels.torch.slstm import backward as slstm_backward

WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


def test_refusals_name_the_value_and_the_rule() -> None:
    q, k, v, i, f = mlstm_inputs(4)
    state = mlstm_state()
    for message, call in {
        r"input_gate='relu' must be one of exp, sigmoid": lambda: kernels.mlstm(q, k, v, i, f, input_gate="relu"),
        r"forget_gate='tanh' must be one of": lambda: kernels.mlstm(q, k, v, i, f, forget_gate="tanh"),
        r"eps=-1": lambda: kernels.mlstm(q, k, v, i, f, eps=-1.0),
        r"needs eps=0, given eps=1e-06": lambda: kernels.mlstm(q, k, v, i, f, forget_gate="exp"),
        r"eps=nan must be at least 0 and finite": lambda: kernels.mlstm(q, k, v, i, f, eps=float("nan")),
        r"forget_gate='exp' needs input_gate='exp', given 'sigmoid'": lambda: kernels.mlstm(
            q, k, v, i, f, input_gate="sigmoid", forget_gate="exp", eps=0.0
        ),
        r"input_gate='exponential' must be one of": lambda: mlstm.chunkwise(q, k, v, i, f, input_gate="exponential"),
        r"forget_gate='exponential' must be": lambda: slstm.recurrent(*slstm_inputs(2), forget_gate="exponential"),
        r"chunk=0 must be at least 1": lambda: kernels.mlstm(q, k, v, i, f, chunk=0),
        r"state\.C must be torch\.float64.*given torch\.float32": lambda: kernels.mlstm(
            q, k, v, i, f, state.detach().to(torch.float32)
        ),
        r"state\.C must be torch\.float32.*given torch\.bfloat16": lambda: kernels.mlstm(
            *(x.detach().bfloat16() for x in (q, k, v, i, f)), state.detach().to(torch.bfloat16)
        ),
        r"state\.C must have shape \[2, 3, 5, 7\], given \[2, 3, 5, 8\]": lambda: kernels.mlstm(
            q, k, v, i, f, mLSTMState.empty(B, H, K, V + 1, dtype=torch.float64)
        ),
        r"state\.h must have shape": lambda: kernels.slstm(*slstm_inputs(4), sLSTMState.empty(B, H, K + 1)),
        r"backend='cuda' does not exist; there are 'auto', 'triton', 'cpu', 'torch'": lambda: kernels.mlstm(
            q, k, v, i, f, backend="cuda"
        ),
        r"forget_gate='none' must be one of": lambda: kernels.slstm(*slstm_inputs(4), forget_gate="none"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_shapes_are_refused_without_the_shape_checker() -> None:
    """In production nothing checks annotations: the doors themselves must refuse."""
    program = """
import torch
from openxlstm import kernels
q = torch.zeros(2, 4, 3, 5); v = torch.zeros(2, 4, 3, 7); i = torch.zeros(2, 4, 3)
for name, call in {
    "k must have shape [2, 4, 3, 5], given [2, 4, 3, 6]": lambda: kernels.mlstm(q, torch.zeros(2, 4, 3, 6), v, i, i),
    "v must have shape [2, 4, 3, 7], given [2, 5, 3, 7]": lambda: kernels.mlstm(q, q, torch.zeros(2, 5, 3, 7), i, i),
    "f must have shape [2, 4, 3], given [2, 4, 2]": lambda: kernels.mlstm(q, q, v, i, i[..., :2]),
    "q must have 4 axes, [B, T, H, K], given [2, 4, 15]": lambda: kernels.mlstm(q.flatten(2), q, v, i, i),
    "mask must be bool [2, 4], given torch.float32 [2, 4]": lambda: kernels.mlstm(q, q, v, i, i, mask=torch.ones(2, 4)),
    "reset must be bool [2, 4], given torch.bool [2, 5]": lambda: kernels.mlstm(
        q, q, v, i, i, reset=torch.ones(2, 5).bool()),
    "q must be bf16, fp16, fp32 or fp64, given torch.int64; use q.float()": lambda: kernels.mlstm(
        q.long(), q, v, i, i),
    "i must be bf16, fp16, fp32 or fp64, given torch.bool; use i.float()": lambda: kernels.mlstm(
        q, q, v, i.bool(), i),
    "R must have shape [3, 5, 4, 5], given [3, 4, 5, 5]": lambda: kernels.slstm(
        torch.zeros(2, 4, 4, 3, 5), torch.zeros(3, 4, 5, 5), torch.zeros(4, 3, 5)),
    "gates must be [B, T, 4, H, K] (gates in the order i, f, z, o), given [2, 4, 3, 5]": lambda: kernels.slstm(
        q, torch.zeros(3, 5, 4, 5), torch.zeros(4, 3, 5)),
}.items():
    try:
        call()
    except ValueError as error:
        assert str(error) == name, (str(error), name)
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_table_explains_itself() -> None:
    rows = kernels.explain_table("cpu")
    assert {row["op"] for row in rows} == {"mlstm", "mlstm_step", "slstm", "slstm_step"}
    for op in ("mlstm", "slstm_step"):
        assert any(row["op"] == op and row["answer"] == "serves" for row in rows)
    text = kernels.explain("cpu")
    assert "operation" in text
    assert "torch" in text
    call = Call(op="mlstm", device="cpu", dtype=torch.float32, K=64, V=128, needs_grad=True)
    assert resolve(call).__name__.startswith("openxlstm.kernels.")


MEMORY = """
import sys, torch
from openxlstm import kernels
torch.set_num_threads(1)

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20

def growth(T):
    q, k = (torch.randn(1, T, 4, 64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, T, 4, 128, requires_grad=True)
    i, f = (torch.randn(1, T, 4, requires_grad=True) for _ in range(2))
    weight = torch.ones(1, 1, 1, 1).expand(1, T, 4, 128)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here, not at some import
    before = status("VmRSS")
    h, _ = kernels.mlstm(q, k, v, i, f)
    h.backward(weight)
    return status("VmHWM") - before

growth(64)
print(growth(int(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account of a process's memory")
def test_memory_is_linear_in_length_and_below_three_gigabytes(record_property: Callable[[str, object], None]) -> None:
    """Peak growth of forward and backward at B=1, H=4, K=64, V=128, in GiB; one fresh process for each length."""
    growth = {}
    for T in (16_384, 32_768, 65_536):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(T)], check=True, capture_output=True, text=True, timeout=300
        )
        growth[T] = float(done.stdout)
    record_property("measured", "peak growth in GiB, " + ", ".join(f"T={T}: {size:.3f}" for T, size in growth.items()))
    assert growth[65_536] < 3.0
    assert growth[65_536] < 2.3 * growth[32_768]
    assert growth[32_768] < 2.3 * growth[16_384]


def test_the_backward_of_the_slstm_copies_its_matrix_for_no_step() -> None:
    """R is the largest thing there is; broadcast into a product with every step, it took 0.6 GB at K = 192."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    T, width = 40, 64
    gates, R, b = torch.randn(1, T, 4, 2, width), torch.randn(2, width, 4, width), torch.zeros(4, 2, width)
    h, *_, states = torch.ops.openxlstm.slstm(gates, R, b, *torch.zeros(4, 1, 2, width), None, None, "sigmoid")
    with Watch():
        slstm_backward(torch.ones_like(h), None, None, None, gates, R, b, states, None, None, "sigmoid")
    assert largest < 4 * R.nbytes


@pytest.mark.compile
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_operators_of_the_mlstm_are_well_formed(input_gate: str) -> None:
    """PyTorch's own check of schema, fake tensors (shapes, strides), autograd registration and dynamic shapes."""
    x, state = mlstm_inputs(9), mlstm_state(stabilised=input_gate == "exp")
    m = state.m.mT.contiguous().mT  # an awkward layout must not show in a result's
    for flags in ((None, None), tuple(random_flags(9).values())):
        options = (*flags, input_gate, "sigmoid", 1e-6, 4)
        inputs = (*x, state.C, state.n, m)
        torch.library.opcheck(torch.ops.openxlstm.mlstm.default, (*inputs, *options, True))
        inputs = [part.detach() for part in inputs]
        h, C, _, _, a, states = torch.ops.openxlstm.mlstm(*inputs, *options, True)
        backward = (normal(*h.shape), normal(*C.shape), None, *inputs[:5], m, *flags, a, states, *options[2:])
        torch.library.opcheck(torch.ops.openxlstm.mlstm_backward.default, backward, test_utils=WITHOUT_GRADIENT)


@pytest.mark.compile
def test_operators_of_the_slstm_are_well_formed() -> None:
    x, state = slstm_inputs(5), slstm_state()
    for flags in ((None, None), tuple(random_flags(5).values())):
        torch.library.opcheck(torch.ops.openxlstm.slstm.default, (*x, *state.tensors(), *flags, "sigmoid"))
        inputs = [part.detach() for part in (*x, *state.tensors())]
        h, *_, states = torch.ops.openxlstm.slstm(*inputs, *flags, "sigmoid")
        backward = (normal(*h.shape), None, None, None, *inputs[:3], states, *flags, "sigmoid")
        torch.library.opcheck(torch.ops.openxlstm.slstm_backward.default, backward, test_utils=WITHOUT_GRADIENT)


@pytest.mark.compile
@pytest.mark.skipif(not shutil.which("g++"), reason="the default compiler of torch.compile needs a C++ compiler")
def test_trains_under_the_default_compiler() -> None:
    """At a length that no chunk divides: Inductor asserts the strides that the fake implementation promised."""

    def loss(q, k, v, i, f):
        h, end = kernels.mlstm(q * 1.5, k, v, i + 1, f)
        return h.square().sum() + end.C.sum()

    torch._dynamo.reset()
    x = mlstm_inputs(70)
    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph would remember older operators
        got, want = (torch.autograd.grad(run(*x), x) for run in (torch.compile(loss, fullgraph=True), loss))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.compile
@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_compiles_without_a_graph_break_and_once_for_all_lengths(op: str) -> None:
    """fullgraph=True, dynamic T, state in and out, gradients: the same numbers as without the compiler."""
    function = getattr(kernels, op)
    make, start = (mlstm_inputs, mlstm_state) if op == "mlstm" else (slstm_inputs, slstm_state)

    def loss(*args):
        h, end = function(*args)
        return h.square().sum() + sum(part.sum() for part in end.tensors()[:-1]), end

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for T in (37, 64, 130, 200):
        x, state = make(T), start()
        results = []
        for run in (loss, compiled):
            value, end = run(*x, state)
            results.append([value, *end.tensors(), *torch.autograd.grad(value, x)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0], "a new length must not compile anew"
