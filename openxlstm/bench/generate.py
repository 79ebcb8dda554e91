"""Decoding, a token at a time: the suite `generate` of `xlstm bench`.

    small    a NeurIPS model of 2M parameters beside the `step` of `xlstm` 2.0.6
    large    about 400M parameters of the 7B architecture, in bf16, Q8_0 and Q4_0, beside transformers' xLSTM in bf16
             and a Llama in llama.cpp whose file is as large; and eight rows of it, which share one reading of the
             matrices, beside one row

Random weights. The native step is compared with the model itself first: the logits of the same weights. A token reads
every matrix but the embedding once, and reads and writes the state; the ceiling is a read of memory beyond the caches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.bench import llama_cpp
from openxlstm.bench.harness import OURS, Row, Side, check, measure, reading, relative
from openxlstm.bench.peers import nx_model
from openxlstm.checkpoint.convert import export
from openxlstm.infer.decoder import NativeDecoder, decoder, refuses
from openxlstm.models.interface import LanguageModel
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.nn.gates import GateLinear
from openxlstm.nn.quant import QuantEmbedding, QuantLinear, pack_matrices

LIMITS = {"fp32": 2e-5, "bf16": 5e-2, "q8_0": 1e-3, "q4_0": 1e-3}  # bf16: the model itself rounds its activations
POSITIONS = (100, 1_000, 10_000, 100_000)  # tokens read before the one that is timed
READ = 16  # tokens that the state has seen
ROWS = 8  # of the batch that is compared with a single row


@torch.no_grad()
def run(runs: int, say: Callable[[str], None]) -> list[Row]:
    """Rows of both models; `say` hears what comes next."""
    rows = []
    for precision in ("fp32", "bf16"):
        say(f"2M parameters, {precision}")
        rows += small(precision, runs)
    for position in POSITIONS:
        say(f"2M parameters, {position:,} tokens later")
        rows += after(position, runs)
    say("400M parameters: transformers")
    theirs = in_tree() if importlib.util.find_spec("transformers") else None
    if (reason := llama_cpp.absent()) is not None:
        say(reason)
    for kind in ("bf16", "q8_0", "q4_0"):
        say(f"400M parameters, {kind}")
        rows += large(kind, runs, theirs)
    return rows


def small(precision: str, runs: int) -> list[Row]:
    """2.1M parameters, batch 1."""
    torch.manual_seed(0)
    model = xLSTM(xLSTMConfig(vocab_size=512, width=192, heads=4, pattern="mmmsmmmm"))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    case = f"a token, {model.config.label}, 2.1M parameters, batch 1, {precision}"
    sides: list[Side] = []
    if importlib.util.find_spec("xlstm") is not None:
        with TemporaryDirectory() as folder:
            export(model, f"{folder}/peer", to="nxai")
            peer = nx_model(f"{folder}/peer").to(dtype).eval()
        sides = [Side("xlstm, step", _nx_step(peer))]
    model = model.to(dtype).eval()
    return measure(case, [*_ours(model, precision, case), *sides], runs, repeat=20)


def after(position: int, runs: int) -> list[Row]:
    """The same small model when it has decoded `position` tokens: the same time, from the same memory."""
    torch.manual_seed(0)
    model = xLSTM(xLSTMConfig(vocab_size=512, width=192, heads=4, pattern="mmmsmmmm")).eval()
    native = decoder(model, model.empty_state(1))
    token = torch.zeros(1, dtype=torch.long)
    for _ in range(position):
        token = native.step(token).argmax(-1)
    case = f"a token after {position:,}, {model.config.label}, 2.1M parameters, batch 1, fp32"
    return measure(case, [Side(OURS, lambda: native.step(token))], runs, repeat=20)


def large(kind: str, runs: int, theirs: Callable[[], object] | None) -> list[Row]:
    """406M parameters, batch 1, a Llama as large, and a batch of 8."""
    model = large_model(kind)
    case = f"a token, {model.config.label}, 406M parameters, batch 1, {kind}"
    sides = _ours(model, kind, case)
    if theirs is not None:
        sides.append(Side("transformers, bf16", theirs))
    rows = measure(case, sides, runs, work=read_by_a_token(model) / 1e9, unit="GB/s", ceiling=reading())
    if llama_cpp.absent() is None:
        native = NativeDecoder(model, model.empty_state(1))
        rows += llama_cpp.beside(model.config.label, partial(native.step, torch.tensor([5])), kind, runs)
    return rows + (together(model, kind, runs) if refuses(model, ROWS) is None else [])


def large_model(kind: str) -> xLSTMLarge:
    """406M random parameters of the 7B architecture; what is not a large matrix stays fp32, as in a GGUF file."""
    torch.manual_seed(0)
    model = xLSTMLarge(xLSTMLargeConfig(vocab_size=50_304, width=1024, blocks=24, heads=4)).eval()
    if kind == "bf16":
        return model.bfloat16()
    quantise(model, kind)
    return model


def together(model: xLSTMLarge, kind: str, runs: int) -> list[Row]:
    """A token of each of 8 rows in one call, in turn with one row alone. Every row has a state of its own."""
    case = f"a token of {ROWS} rows, {model.config.label}, 406M parameters, {kind}"
    tokens = torch.arange(ROWS)
    many, one = NativeDecoder(model, model.empty_state(ROWS)), NativeDecoder(model, model.empty_state(1))
    error = relative(many.step(tokens)[3:4], one.step(tokens[3:4]))
    check(OURS, case, error, 0.0)  # a row does not notice its company
    sides = [Side(OURS, lambda: many.step(tokens), error), Side(f"{OURS}, one row", lambda: one.step(tokens[3:4]))]
    work = read_by_a_token(model, ROWS) / 1e9
    rows = measure(case, sides, runs, work=work, unit="GB/s", ceiling=reading())
    return [rows[0], replace(rows[1], rate=None, unit=None, of_ceiling=None)]  # the rate is that of eight rows


def read_by_a_token(model: LanguageModel, rows: int = 1) -> int:
    """Bytes of all matrices but the embedding, once, and of every row's state, which is read and written."""
    assert isinstance(model, nn.Module), "a language model is a torch module"
    own = [*model.parameters(), *model.buffers()]
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding | QuantEmbedding))
    table = embedding.blocks if isinstance(embedding, QuantEmbedding) else embedding.weight
    assert isinstance(table, Tensor), "an embedding has a table"
    return sum(x.nbytes for x in own) - table.nbytes + 2 * model.empty_state(rows).nbytes


def quantise(model: nn.Module, kind: str) -> None:
    """Put random blocks in the place of every large matrix: sizes and speed are those of a converted model."""
    scale = torch.tensor([0.02 / (127 if kind == "q8_0" else 8)], dtype=torch.float16).view(torch.uint8)
    for name, module in list(model.named_modules()):
        if isinstance(module, GateLinear) or not isinstance(module, nn.Linear):
            continue
        put = QuantLinear(module.in_features, module.out_features, kind)
        put.blocks.random_(0, 256)
        put.blocks.view(module.out_features, module.in_features // 32, -1)[:, :, :2] = scale
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, put)
    pack_matrices(model)  # as loading a file does


def in_tree() -> Callable[[], object]:
    """A step of transformers' xLSTM of the same sizes, in bf16, from a state that has read some tokens."""
    from openxlstm.hf import in_tree as tree

    sizes = {"vocab_size": 50_304, "hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4}
    model = tree.fresh_model(sizes).bfloat16().eval()
    cache = model(torch.zeros(1, READ, dtype=torch.long), use_cache=True).cache_params
    token = torch.zeros(1, 1, dtype=torch.long)

    def call() -> object:
        with torch.no_grad():
            return model(token, cache_params=cache, use_cache=True)

    return call


def _ours(model: Any, kind: str, case: str) -> list[Side]:
    _, state = model(torch.zeros(1, READ, dtype=torch.long))
    token = torch.tensor([3])
    if (reason := refuses(model, 1)) is not None:
        return [Side(OURS, lambda: model(token[:, None], state)), Side(f"(the native step: {reason})", lambda: None)]
    want = model(token[:, None], state)[0][:, 0]
    error = relative(NativeDecoder(model, state).step(token), want)
    check(OURS, case, error, LIMITS[kind])
    native = NativeDecoder(model, state)
    return [Side(OURS, lambda: native.step(token), error), Side(f"{OURS}, torch", lambda: model(token[:, None], state))]


def _nx_step(peer: nn.Module) -> Callable[[], object]:
    state: Any = None
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(READ):
        _, state = peer.step(token, state=state)  # type: ignore[operator]

    def call() -> object:
        with torch.no_grad():
            return peer.step(token, state=state)  # type: ignore[operator]

    return call
