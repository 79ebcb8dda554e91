"""The native decoding step is the model: logits, states, greedy texts, rows that leave, every instruction set."""

from __future__ import annotations

import pytest
import torch

import openxlstm as ox
from openxlstm.infer import decoder as decoders
from openxlstm.infer.decoder import ModelDecoder, NativeDecoder, decoder, explain, refuses
from openxlstm.kernels.cpu import library
from openxlstm.kernels.quantized import can_pack
from openxlstm.models.xlstm import xLSTM
from openxlstm.models.xlstm_large import xLSTMLarge
from openxlstm.nn.linear import Linear
from openxlstm.nn.quant import QuantLinear

W = 61
FOUND = library.native()
needs_library = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
ISAS = [] if isinstance(FOUND, str) else [library.Native(FOUND.library, isa) for isa in range(FOUND.isa + 1)]

XLSTM = {
    "mixed": {"pattern": "mmsm"},
    "s alone, exponential forget gate": {"pattern": "ss", "forget_gate": "exp", "eps": 0.0},
    "m, exponential forget gate": {"pattern": "mm", "forget_gate": "exp", "eps": 0.0},
    "biases, no convolution, tied, three heads": {
        "pattern": "sm", "width": 48, "heads": 3, "mlstm_width": 96, "conv": 0, "bias": True, "tie_embeddings": True,
    },
    "sigmoid input gate": {"pattern": "ms", "input_gate": "sigmoid"},
    "sigmoid with normaliser, long taps, odd widths": {
        "pattern": "msm", "width": 36, "heads": 2, "mlstm_width": 40, "ffn_width": 23, "conv": 7, "proj_block": 10,
        "input_gate": "sigmoid_normalized",
    },
}  # fmt: skip
LARGE = {
    "plain": {},
    "sigmoid, tied": {"input_gate": "sigmoid", "tie_embeddings": True},
    "narrow queries": {"qk_width": 24, "v_width": 72, "ffn_width": 50},
}


def model_of(case: str) -> xLSTM | xLSTMLarge:
    kind, name = case.split(": ", 1)
    if kind == "xlstm":
        config = {"vocab_size": W, "width": 64, "heads": 4, **XLSTM[name]}
        model: xLSTM | xLSTMLarge = ox.xLSTM(ox.xLSTMConfig(**config))
    else:
        config = {"vocab_size": W, "width": 72, "blocks": 2, "heads": 3, **LARGE[name]}
        model = ox.xLSTMLarge(ox.xLSTMLargeConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


CASES = [f"xlstm: {name}" for name in XLSTM] + [f"large: {name}" for name in LARGE]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel():
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6))


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_step_is_the_model(case: str, isa: library.Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64, whose rounding is nobody's: the native step is as near as fp32 is, logits and state."""
    monkeypatch.setattr(decoders, "native", lambda: isa)
    model = model_of(case)
    for rows in (1, 3, 6):
        tokens = torch.randint(0, W, (rows, 7))
        _, state = model(tokens)
        exact = model_of(case).double()
        exact.load_state_dict(model.state_dict())
        before = state.map(lambda x: x.double())
        native, plain = NativeDecoder(model, state), ModelDecoder(model, state)
        for _ in range(12):
            token = torch.randint(0, W, (rows,))
            want, before = exact(token[:, None], before)
            # With an exponential forget gate nothing bounds the denominator from below: fp32 itself can be far off.
            rounding = relative(plain.step(token), want[:, 0]) if "exponential" in case else 0.0
            assert relative(native.step(token), want[:, 0]) <= max(2e-5, 10 * rounding)
        for (name, got), (_, want) in zip(native.state.named_tensors(), before.named_tensors(), strict=True):
            assert relative(got, want) <= max(2e-5, 100 * rounding), name


@needs_library
@torch.no_grad()
def test_a_state_is_held_twice_only_if_it_is_wanted() -> None:
    model = model_of(CASES[0])
    _, state = model(torch.randint(0, W, (2, 5)))
    kept, token = state.clone(), torch.randint(0, W, (2,))
    scores = [NativeDecoder(model, state).step(token)]
    for mine, x in zip(state.tensors(), kept.tensors(), strict=True):
        torch.testing.assert_close(mine, x, rtol=0, atol=0)  # copied, and so not written
    native = decoders.decoder(model, state)
    assert isinstance(native, NativeDecoder)
    addresses = [x.data_ptr() for x in native._state.tensors()]
    assert addresses == [x.data_ptr() for x in state.tensors()]  # given away
    torch.testing.assert_close(native.step(token), scores[0], rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bf16_weights_are_the_same_weights_in_fp32(case: str) -> None:
    half = model_of(case).bfloat16()
    full = model_of(case)
    full.load_state_dict(half.state_dict())  # upcast, nothing rounded
    _, state = full(torch.randint(0, W, (2, 5)))
    a, b = NativeDecoder(half, state), NativeDecoder(full, state)
    for _ in range(10):
        token = torch.randint(0, W, (2,))
        assert relative(a.step(token), b.step(token)) <= 1e-5


@needs_library
@pytest.mark.parametrize("case", ["xlstm: mixed", "large: plain"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "bf16", "f32"])
@pytest.mark.parametrize(("isa", "packed"), [(isa, False) for isa in ISAS] + [(isa, True) for isa in ISAS[-1:]],
                         ids=lambda x: "packed" if x is True else "rows" if x is False else x.name)  # fmt: skip
@torch.no_grad()
def test_blocks_are_multiplied_as_their_numbers(
    case: str, kind: str, isa: library.Native, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every quantised matrix against the same model with the dequantised numbers, to the rounding of fp32 sums.

    Where bytes are multiplied, activations have 15 bits; that is a hundred times finer than what the weights have lost.
    """
    limit = 1e-3 if packed and can_pack(kind) else 2e-5
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(decoders, "native", lambda: isa)
    types = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "bf16": "BF16", "f32": "F32"}
    model, plain = model_of(case), model_of(case)
    plain.load_state_dict(model.state_dict())
    for name, module in list(plain.named_modules()):
        if type(module) is not Linear or module.in_features % 32:
            continue
        weight = module.weight.detach()
        data = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[types[kind]])
        blocks = torch.from_numpy(data.copy()).view(torch.uint8).reshape(module.out_features, -1)
        quantised = QuantLinear(module.in_features, module.out_features, kind, bias=module.bias is not None)
        quantised.blocks = blocks
        if module.bias is not None:
            quantised.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
        weight.copy_(quantised.weight)
        if packed:
            quantised.pack()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantised)
    assert refuses(model, 1) is None
    for rows in (1, 2, 5):
        _, state = plain(torch.randint(0, W, (rows, 5)))
        a, b = NativeDecoder(model, state), NativeDecoder(plain, state)
        for _ in range(6):
            token = torch.randint(0, W, (rows,))
            assert relative(a.step(token), b.step(token)) <= limit


@needs_library
@torch.no_grad()
def test_rows_do_not_notice_their_company_nor_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in CASES[:1] + CASES[-1:]:
        model = model_of(case)
        _, state = model(torch.randint(0, W, (9, 6)))
        tokens = torch.randint(0, W, (4, 9))
        whole = NativeDecoder(model, state)
        want = [whole.step(token) for token in tokens]
        for rows in ([0], [3, 5], [8, 1, 2, 6, 0]):
            part = NativeDecoder(model, state.select(torch.tensor(rows)))
            for token, full in zip(tokens, want, strict=True):
                assert torch.equal(part.step(token[rows]), full[rows])
        for threads in (1, 2, 5):
            monkeypatch.setattr(decoders, "threads", lambda threads=threads: threads)
            again = NativeDecoder(model, state)
            assert all(torch.equal(again.step(token), full) for token, full in zip(tokens, want, strict=True))


@needs_library
@torch.no_grad()
def test_a_state_that_goes_in_is_not_written_to_and_rows_can_leave() -> None:
    model = model_of("xlstm: mixed")
    _, state = model(torch.randint(0, W, (4, 6)))
    copy = state.clone()
    native, torch_side = NativeDecoder(model, state), ModelDecoder(model, state)
    for keep in (None, torch.tensor([0, 2, 3]), torch.tensor([1])):
        if keep is not None:
            native.select(keep), torch_side.select(keep)
        rows = native.state.tensors()[0].shape[0]
        token = torch.randint(0, W, (rows,))
        assert relative(native.step(token), torch_side.step(token)) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), copy.tensors(), strict=True))


@needs_library
@pytest.mark.parametrize("case", ["xlstm: mixed", "large: plain"])
def test_texts_are_those_of_the_model_token_for_token(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(case), ox.Tokenizer.bytes()
    with torch.no_grad():
        wide = type(model)(type(model.config).from_dict(model.config.to_dict() | {"vocab_size": 257}))
        for parameter in wide.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    prompts = ["def ", "class A:", "x"]
    options = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 3, "stop": ["\n\n"]}]
    got = [ox.generate(wide, tokenizer, prompts, max_tokens=150, **option) for option in options]
    monkeypatch.setattr(decoders, "native", lambda: "hidden by this test")
    assert explain(wide).endswith("hidden by this test")
    assert got == [ox.generate(wide, tokenizer, prompts, max_tokens=150, **option) for option in options]


@needs_library
def test_what_it_cannot_decode_it_says() -> None:
    model = model_of("xlstm: mixed")
    assert refuses(model, 16) is None
    assert "17 rows" in (refuses(model, 17) or "")
    assert "float64" in (refuses(model_of("xlstm: mixed").double(), 1) or "")
    hooked = model_of("large: plain")
    hooked.backbone.blocks[1].ffn.proj_up.register_forward_hook(lambda *_: None)
    assert "blocks.1.ffn.proj_up has a hook" in (refuses(hooked, 1) or "")
    replaced = model_of("large: plain")
    replaced.backbone.blocks[0].ffn.proj_up = torch.nn.Sequential(replaced.backbone.blocks[0].ffn.proj_up)
    assert "is a Sequential" in (refuses(replaced, 1) or "")
    with torch.no_grad():
        _, state = replaced(torch.zeros(1, 3, dtype=torch.long))
    assert isinstance(decoder(replaced, state), ModelDecoder)


@needs_library
def test_it_names_the_instructions_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is AMX code for sequences alone."""
    for isa in ISAS:
        monkeypatch.setattr(decoders, "native", lambda isa=isa: isa)
        said = "avx512_bf16" if isa.name == "amx" else isa.name
        assert explain(model_of("large: plain")) == f"one native call per token, {said} instructions"


@needs_library
@torch.no_grad()
def test_bad_tokens_are_refused_before_memory_is_read() -> None:
    model = model_of("large: plain")
    _, state = model(torch.randint(0, W, (2, 3)))
    native = NativeDecoder(model, state)
    for bad in (torch.tensor([0, W]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=f"must lie in 0 .. {W - 1}"):
            native.step(bad)
    with pytest.raises(ValueError, match=r"tokens must be \[2\]"):
        native.step(torch.tensor([1]))
