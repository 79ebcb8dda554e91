"""What surrounds the cells, native: every instruction set against float64, and against the leaves that define it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import assert_equal, error, normal, unchanged

from openxlstm.kernels import cpu, glue
from openxlstm.kernels.cpu import glue_ops, library
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.nn import fused
from openxlstm.nn.conv import ConvSiLU, causal_conv
from openxlstm.nn.gates import GateLinear
from openxlstm.nn.linear import HeadwiseLinear
from openxlstm.nn.norm import HeadNorm, LayerNorm

FOUND = library.native()
pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
ISAS = [] if isinstance(FOUND, str) else [library.Native(FOUND.library, isa) for isa in range(FOUND.isa + 1)]
isas = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
dtypes = pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
B = 2


def results(outputs, inputs, seed=1) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a fixed random projection of them, by name."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        weight = torch.randn(output.shape, generator=generator).bfloat16().double()
        loss = loss + (output.double() * weight).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    found = outputs | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {name: x for name, x in found.items() if x.numel()}


def double(inputs):
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def headwise(x, weight):
    return torch.einsum("btnd,nod->btno", x.unflatten(-1, (-1, weight.shape[-1])), weight).flatten(-2)


def project_inputs(T: int, U: int, J: int, G: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = normal(B, T, 2 * U + 1).to(dtype)[:, :, 1 : U + 1]  # a view with strides of its own
    inputs = {"x": x, "w": normal(U, J, std=0.5), "b": normal(U), "past": normal(B, J - 1, U)}
    inputs |= {name: normal(U // 4, 4, 4, std=0.5) for name in ("Wq", "Wk", "Wv")}
    inputs |= {"gate_w": normal(G, 3 * U, std=U**-0.5), "gate_b": normal(G)}
    return {name: (p if name == "x" else p.float()).requires_grad_() for name, p in inputs.items()}


def projected(x, reset, mask):
    """The definition in the dtype of its inputs, zeros where the mask says that no step exists."""
    c, last = causal_conv(x["x"], x["w"], x["b"], x["past"], reset=reset, mask=mask)
    c = F.silu(c)
    q, k, v = headwise(c, x["Wq"]), headwise(c, x["Wk"]), headwise(x["x"], x["Wv"])
    raw = torch.cat((q, k, v), -1) @ x["gate_w"].T + x["gate_b"]
    there = 1.0 if mask is None else mask[..., None].double()
    return {"c": c * there, "q": q * there, "k": k * there, "v": v * there, "raw": raw * there, "last": last}


def natively(x, reset, mask):
    maps, gates = (x["Wq"], x["Wk"], x["Wv"]), (x["gate_w"], x["gate_b"])
    *out, last = glue.project(x["x"], x["w"], x["b"], x["past"], maps, gates, reset=reset, mask=mask)
    if mask is not None:  # of the gates nothing is promised there
        out[4] = torch.where(mask[..., None], out[4], 0.0)
    return dict(zip(("c", "q", "k", "v", "raw", "last"), (*out, last), strict=True))


def flags(T: int, which: str):
    reset = {"reset": torch.rand(B, T) < 0.25} if "r" in which else {}
    return reset | ({"mask": torch.rand(B, T) > 0.3} if "m" in which else {})


@isas
@dtypes
@pytest.mark.parametrize(("U", "J", "G"), [(12, 1, 5), (20, 4, 6), (36, 2, 9), (260, 4, 8)])
def test_what_stands_before_a_cell_is_the_definition(isa, U, J, G, dtype, limit, monkeypatch) -> None:
    monkeypatch.setattr(glue_ops, "_library", lambda: isa)
    for T in (1, 2, 3, 4, 5, 15, 64, 65):
        x = project_inputs(T, U, J, G, dtype)
        x64 = double(x)
        for which in ("", "r", "m", "rm"):
            given = {"reset": None, "mask": None} | flags(T, which)
            names = [name for name in x if J > 1 or name != "past"]
            with unchanged(*x.values()):
                got = results(natively(x, **given), {name: x[name] for name in names})
            want = results(projected(x64, **given), {name: x64[name] for name in names})
            assert got["q"].dtype == got["c"].dtype == dtype
            assert all(got[name].dtype == torch.float32 for name in ("raw", "last") if name in got)
            assert_equal(got, want, limit, f"{isa.name}, T={T}, U={U}, J={J}, {which}")


@isas
@dtypes
@pytest.mark.parametrize(("U", "J"), [(1, 4), (7, 3), (66, 4)])
def test_the_convolution_alone_is_the_definition(isa, U, J, dtype, limit, monkeypatch) -> None:
    monkeypatch.setattr(glue_ops, "_library", lambda: isa)
    for T in (1, 2, 9, 40):
        x = {"x": normal(B, T, U).to(dtype), "w": normal(U, J).float(), "b": normal(U).float()}
        x = {name: p.requires_grad_() for name, p in (x | {"past": normal(B, J - 1, U).float()}).items()}
        x64 = double(x)
        for which in ("", "r", "m", "rm"):
            given = {"reset": None, "mask": None} | flags(T, which)
            y, *_, last = glue.project(*x.values(), **given)
            y64, last64 = causal_conv(*x64.values(), **given)
            there = 1.0 if given["mask"] is None else given["mask"][..., None].double()
            want = results({"y": F.silu(y64) * there, "last": last64}, x64)
            assert_equal(results({"y": y, "last": last}, x), want, limit, f"{isa.name}, T={T}, U={U}, {which}")


def test_where_no_step_exists_a_nan_reaches_nothing() -> None:
    x = project_inputs(9, 8, 4, 2, torch.float32)
    mask = torch.rand(B, 9) < 0.6
    with torch.no_grad():
        x["x"][~mask] = torch.nan
    found = results(natively(x, None, mask), x)
    assert all(p.isfinite().all() for p in found.values())
    assert (found["dx"][~mask] == 0).all()
    for name in "cqkv":
        assert (found[name][~mask] == 0).all(), name


@dtypes
def test_a_row_does_not_notice_its_company_nor_the_threads(dtype, limit, monkeypatch) -> None:
    x = project_inputs(23, 132, 4, 8, dtype)
    reset = torch.rand(B, 23) < 0.2
    h, z = normal(B, 23, 3, 44).to(dtype).requires_grad_(), normal(B, 23, 264).to(dtype)[..., 132:].requires_grad_()
    weight, skip = (normal(132).float().requires_grad_() for _ in range(2))

    def all_of() -> dict[str, torch.Tensor]:
        first = results(natively(x, reset, None), x)
        c = x["x"].detach().clone().requires_grad_()
        second = results({"y": glue.gate(h, c, z, weight, skip, 1e-5)}, {"h": h, "c2": c, "z": z, "weight": weight})
        third = results({"n": glue.layer_norm(c, skip, 1e-5, torch.float32)}, {"c3": c, "skip": skip})
        return first | second | third

    one = all_of()
    for threads in (2, 3, 16):
        monkeypatch.setattr(glue_ops, "threads", lambda threads=threads: threads)
        again = all_of()
        assert all(torch.equal(one[name], again[name]) for name in one), threads
    alone = {name: (p[:1] if name in ("x", "past") else p).detach().requires_grad_() for name, p in x.items()}
    for name, part in natively(alone, reset[:1], None).items():
        assert torch.equal(part, one[name][:1]), name


@isas
@dtypes
@pytest.mark.parametrize(("H", "V"), [(1, 1), (3, 5), (2, 16), (4, 40)])
def test_norm_skip_and_gate_are_the_definition(isa, H, V, dtype, limit, monkeypatch) -> None:
    monkeypatch.setattr(glue_ops, "_library", lambda: isa)
    for T in (1, 3, 37):
        U = H * V
        x = {"h": normal(B, T, H, V, mean=0.5), "c": normal(B, T, U), "z": normal(B, T, 2 * U)[..., U:]}
        x = {name: p.to(dtype).requires_grad_() for name, p in x.items()}
        x |= {name: normal(U, mean=1.0).float().requires_grad_() for name in ("weight", "skip")}
        x64 = double(x)

        def definition(h, c, z, weight, skip):
            normed = F.layer_norm(h, h.shape[-1:], eps=1e-5).flatten(-2) * weight
            return {"y": (normed + skip * c) * F.silu(z)}

        with unchanged(*x.values()):
            got = results({"y": glue.gate(*x.values(), 1e-5)}, x)
        want = results(definition(**x64), x64)
        if V == 1:  # the normalised number is 0, and so are its gradients, up to rounding
            got, want = ({name: p for name, p in of.items() if name not in ("dh", "dweight")} for of in (got, want))
        assert_equal(got, want, limit, f"{isa.name}, T={T}, H={H}, V={V}")


@isas
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [3, 16, 65])
def test_layer_norm_from_one_dtype_to_another(isa, x_dtype, y_dtype, D, monkeypatch) -> None:
    monkeypatch.setattr(glue_ops, "_library", lambda: isa)
    for shape in ((D,), (1, D), (5, 7, D), (0, 4, D)):
        x = {"x": normal(*shape, mean=3.0).to(x_dtype), "weight": normal(D).float()}
        x = {name: p.requires_grad_() for name, p in x.items()}
        x64 = double(x)
        got = results({"y": glue.layer_norm(x["x"], x["weight"], 1e-5, y_dtype)}, x)
        want = results({"y": F.layer_norm(x64["x"], (D,), x64["weight"], eps=1e-5)}, x64)
        assert all(got[name].dtype == dtype for name, dtype in (("y", y_dtype), ("dx", x_dtype)) if name in got)
        limit = 2e-5 if x_dtype == y_dtype == torch.float32 else 1e-2
        assert_equal(got, want, limit, f"{isa.name}, {shape}")


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Its parameters as training might leave them."""
    for parameter in module.parameters():
        wide = parameter.ndim > 1
        torch.nn.init.normal_(parameter, 0.0 if wide else 1.0, parameter.shape[-1] ** -0.5 if wide else 1.0)
    return module


def what_is_fused(T: int) -> dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor], Callable[..., dict]]]:
    """Every operator as models call it: its modules, its inputs and the call."""
    U, H = 64, 4
    x, c, z = (normal(B, T, U, mean=0.5).bfloat16() for _ in range(3))
    before = torch.nn.ModuleList([ConvSiLU(U, 4), *(HeadwiseLinear(U // 4, 4) for _ in range(3))])
    before.extend([GateLinear(3 * U, H), GateLinear(3 * U, H)])
    names = ("c", "q", "k", "v", "i", "f", "last")

    def project(m, x, past):
        return dict(zip(names, fused.conv_qkv_gates(x, m[0], (*m[1:4],), (m[4], m[5]), past, None, None), strict=True))

    def convolve(m, x, past):
        return dict(zip(("y", "last"), m(x, past), strict=True))

    def gate(m, h, c, z, skip):
        return {"y": fused.norm_skip_gate(h.unflatten(-1, (H, -1)), c, z, m, skip)}

    past, skip = normal(B, 3, U).float(), normal(U, mean=1.0).float()
    return {
        "project": (before, {"x": x, "past": past}, project),
        "convolution": (ConvSiLU(U, 4), {"x": x, "past": past}, convolve),
        "gate": (HeadNorm(H, U // H, 1e-5), {"h": x, "c": c, "z": z, "skip": skip}, gate),
        "norm": (LayerNorm(U), {"x": x}, lambda m, x: {"y": m(x)}),
        "norm of fp32": (LayerNorm(U), {"x": x.float() + 1e-3}, lambda m, x: {"y": m(x, for_matmul=True)}),
    }


@pytest.mark.parametrize("name", list(what_is_fused(1)))
def test_in_bf16_nothing_is_less_exact_than_by_the_leaves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and gradient beside float64; a number that both round once is equally far off."""
    module, x, call = what_is_fused(65)[name]
    filled(module)

    def computed(dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        of = copy.deepcopy(module) if dtype is None else copy.deepcopy(module).to(dtype)
        given = {key: (p if dtype is None else p.to(dtype)).detach().requires_grad_() for key, p in x.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            outputs = call(of, **given)
        if name == "norm of fp32" and dtype is None:
            outputs = {"y": outputs["y"].bfloat16()}  # as the product behind it reads it
        return results(outputs, given | dict(of.named_parameters()))

    used: list[str] = []
    for function in ("project", "gate", "layer_norm"):
        monkeypatch.setattr(glue, function, noting(used, function))
    got = computed(None)
    assert len(used) == 1, "one pass, natively"
    monkeypatch.setattr(glue, "serves", lambda *inputs: False)
    leaves, exact = computed(None), computed(torch.float64)
    assert len(used) == 1
    for key, want in exact.items():
        assert got[key].dtype == leaves[key].dtype, key
        native, composed = error(got[key], want), error(leaves[key], want)
        assert native <= 1.01 * composed + 5e-7, f"{name}, {key}: {native:.2e}, by the leaves {composed:.2e}"


def test_far_from_zero_a_norm_loses_nothing() -> None:
    """A variance as the mean of squares less the square of the mean would be noise here."""
    x = 300 + normal(3, 64)
    want = F.layer_norm(x.float().double(), (64,), eps=1e-5)
    torch.testing.assert_close(
        glue.layer_norm(x.float(), torch.ones(64), 1e-5, torch.float32).double(), want, rtol=1e-3, atol=2e-4
    )


def model(**options) -> xLSTM:
    found = xLSTM(xLSTMConfig(vocab_size=11, width=24, heads=3, pattern="msm", mlstm_width=48, **options))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def step(of: xLSTM, tokens, reset, mask, autocast: bool) -> dict[str, torch.Tensor]:
    of.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, state = of(tokens[:, :7], reset=reset[:, :7], mask=mask[:, :7])
        second, state = of(tokens[:, 7:], state, reset=reset[:, 7:], mask=mask[:, 7:])
    logits = torch.where(mask[..., None], torch.cat((first, second), 1), 0.0)
    (
        logits.square().mean()
        + sum(p.square().mean() for block in state.blocks for p in (block.conv, *block.cell.tensors()))
    ).backward()
    return {"logits": logits} | {name: p.grad for name, p in of.named_parameters()}


def noting(used: list[str], name: str):
    """The function of that name, which also writes it down."""
    function = getattr(glue, name)

    def noted(*args, **options):
        used.append(name)
        return function(*args, **options)

    return noted


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_model_is_the_same_without_them(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    of, tokens = model(), torch.randint(11, (2, 19))
    reset, mask = torch.rand(2, 19) < 0.2, torch.rand(2, 19) > 0.2
    used = []
    for name in ("project", "gate", "layer_norm"):
        monkeypatch.setattr(glue, name, noting(used, name))
    got = step(of, tokens, reset, mask, autocast)
    assert set(used) == {"project", "gate", "layer_norm"}
    monkeypatch.setattr(glue, "serves", lambda *inputs: False)
    used.clear()
    want = step(of, tokens, reset, mask, autocast)
    assert not used
    assert_equal(got, want, 4e-2 if autocast else 1e-4, "model")  # two bf16 computations, neither of them exact


@pytest.mark.parametrize("case", ["bias", "blocks of 8", "no taps", "hook", "wrapped", "double"])
def test_what_is_not_plain_goes_through_its_modules(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"bias": {"bias": True}, "blocks of 8": {"proj_block": 8}, "no taps": {"conv": 0}}.get(case, {})
    of = model(**options)
    calls = []
    monkeypatch.setattr(glue, "project", lambda *a, f=glue.project, **k: (calls.append(a[4:5]), f(*a, **k))[1])
    block = of.stack.blocks[0]
    seen = []
    if case == "hook":
        block.k.register_forward_hook(lambda *_: seen.append("k"))
    if case == "wrapped":
        whole = block.q.forward
        block.q.forward = lambda x: (seen.append("q"), whole(x))[1]
    if case == "double":
        of.double()
    of(torch.randint(11, (1, 5)))
    fused_calls = [maps for maps in calls if maps and maps[0] is not None]
    assert len(fused_calls) == (1 if case in ("hook", "wrapped") else 0)  # the other m block is untouched
    assert seen == (["k"] if case == "hook" else ["q"] if case == "wrapped" else [])


def test_who_is_not_served() -> None:
    x = torch.zeros(2, 4)
    assert glue.serves(x, None, x.bfloat16())
    assert not glue.serves(x, x.double())
    assert not glue.serves(x.half())
    assert not glue.serves(x.to("meta"))
    seen = []
    torch.vmap(lambda row: (seen.append(glue.serves(row)), row)[1])(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(glue.serves(torch.autograd.forward_ad.make_dual(x, x)))
    assert seen == [False, False]


def test_without_the_library_the_leaves_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: "no compiler")
    assert not glue.serves(torch.zeros(1))


def test_second_derivatives_are_refused() -> None:
    norm = LayerNorm(8)
    x = torch.randn(2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_operators_keep_their_promises_to_the_compiler() -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.openxlstm_cpu
    for dtype in (torch.float32, torch.bfloat16):
        x = project_inputs(5, 8, 4, 2, dtype)
        reset, mask = torch.rand(B, 5) < 0.3, torch.rand(B, 5) < 0.7
        weights = [x[name] for name in ("w", "b", "Wq", "Wk", "Wv", "gate_w", "gate_b", "past")]
        torch.library.opcheck(ops.project.default, (x["x"], *weights, reset, mask), test_utils=checks)
        none = (None,) * 5
        torch.library.opcheck(
            ops.project.default, (x["x"], *weights[:2], *none, x["past"], None, None), test_utils=checks
        )
        out = [torch.randn(B, 5, 8).to(dtype) for _ in range(4)]
        cotangents = (*out, torch.randn(B, 5, 2), None)
        plain = [p.detach() for p in (x["x"], *weights)]
        torch.library.opcheck(
            ops.project_backward.default, (*cotangents, *plain, reset, mask, *out), test_utils=checks[:2]
        )
        h, c, z = (torch.randn(B, 3, *shape).to(dtype).requires_grad_() for shape in ((2, 4), (8,), (8,)))
        args = (h, c, z, x["b"], x["b"].detach(), 1e-5)
        torch.library.opcheck(ops.gate.default, args, test_utils=checks)
        torch.library.opcheck(ops.norm.default, (c, x["b"], 1e-5, torch.bfloat16), test_utils=checks)


@pytest.mark.compile
@pytest.mark.slow
def test_it_compiles_whole_for_every_length() -> None:
    conv, norm, head_norm = ConvSiLU(8, 4), LayerNorm(8), HeadNorm(2, 4, 1e-5)
    maps, gates = tuple(HeadwiseLinear(2, 4) for _ in range(3)), tuple(GateLinear(24, 2) for _ in range(2))
    parts = torch.nn.ModuleList([conv, norm, head_norm, *maps, *gates])
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter)

    def loss(x, mask):
        c, q, k, v, i, f, tail = fused.conv_qkv_gates(norm(x), conv, maps, gates, None, None, mask)
        y = fused.norm_skip_gate((q + k).unflatten(-1, (2, 4)), c, v, head_norm, norm.weight)
        there = mask[..., None].float()  # elsewhere nothing is promised, and a compiler may go through the leaves
        return ((y.square().sum(-1, keepdim=True) + i.sin() + f.cos()) * there).sum() + tail.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for T in (7, 12, 30):
        x, mask = torch.randn(2, T, 8, requires_grad=True), torch.rand(2, T) < 0.8
        got, want = (torch.autograd.grad(form(x, mask), [x, *parts.parameters()]) for form in (compiled, loss))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
