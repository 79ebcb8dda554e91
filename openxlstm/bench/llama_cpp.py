"""llama.cpp beside us: a Llama whose file is as large as our model's, decoded at some context, the same threads.

    python -m openxlstm.bench.llama_cpp --kinds q8_0 --contexts 128 4096 --grouped

Not the same architecture: the question is what a token costs whoever reads as many bytes of weights. A Llama reads its
keys and values besides, the more the longer the context; an xLSTM its state, always as large. Random weights, written
by the `gguf` library; llama.cpp is what the package `xllamacpp` brings (its wheel is built for AVX2, and says so), run
in this process and asked for tokens until a number is there, never to stop earlier.

V vocabulary, D width, F feed-forward width.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from openxlstm.bench.harness import OURS, Row, Side, measure

PACKAGE = "xllamacpp"
TOKENS = 16  # of a turn
FLASH = {"off": (False,), "on": (True,), "both": (False, True)}
BLOCKS = {"q8_0": (34, 127), "q4_0": (18, 8)}  # bytes of 32 weights, and the largest integer: their scale is 0.02 / it


@dataclass(frozen=True, slots=True)
class Shape:
    """406.6M parameters, as many as the xLSTM beside it has."""

    vocabulary: int = 50_304
    width: int = 1024
    blocks: int = 24
    heads: int = 16
    kv_heads: int = 16
    feed_forward: int = 2752


PLAIN = Shape()
GROUPED = Shape(kv_heads=4, feed_forward=3264)  # grouped-query attention, and as many parameters


def absent() -> str | None:
    """One sentence if llama.cpp cannot be compared here."""
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    return f"llama.cpp is not compared: {' and '.join(missing)} not installed" if missing else None


def write(path: Path, kind: str, shape: Shape, longest: int) -> None:
    """A Llama of random weights as a GGUF file; `kind` is that of all matrices, the embedding included."""
    gguf = importlib.import_module("gguf")
    kinds, types = gguf.GGMLQuantizationType, gguf.LlamaFileType
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(longest)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(types[f"MOSTLY_{kind.upper()}"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>".encode() for number in range(shape.vocabulary)])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([3] * 3 + [1] * (shape.vocabulary - 3))  # three control tokens, and ordinary ones
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, rows: int, columns: int) -> None:
        if kind == "bf16":
            drawn = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
            data = (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            size, largest = BLOCKS[kind]
            blocks = rng.integers(0, 256, (rows, columns // 32, size), dtype=np.uint8)
            blocks[:, :, :2] = np.frombuffer(np.float16(0.02 / largest).tobytes(), dtype=np.uint8)
            data = blocks.reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kinds[kind.upper()])

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))

    D, F, shared = shape.width, shape.feed_forward, shape.width * shape.kv_heads // shape.heads
    matrix("token_embd", shape.vocabulary, D)
    for block in range(shape.blocks):
        norm(f"blk.{block}.attn_norm")
        norm(f"blk.{block}.ffn_norm")
        for name, rows, columns in (
            ("attn_q", D, D), ("attn_k", shared, D), ("attn_v", shared, D), ("attn_output", D, D),
            ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F),
        ):  # fmt: skip
            matrix(f"blk.{block}.{name}", rows, columns)
    norm("output_norm")
    matrix("output", shape.vocabulary, D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoding(path: Path, shape: Shape, context: int, *, flash: bool) -> Callable[[], object]:
    """`TOKENS` tokens after `context` others, which are read once, here, and kept.

    Args:
        flash: fused attention, which llama.cpp has on by itself; on a CPU it is the slower one for a single token.

    Raises:
        ValueError: it decoded another number of tokens, or read the context again.
    """
    theirs: Any = importlib.import_module(PACKAGE)
    options = theirs.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.verbosity, options.warmup = context + 4 * TOKENS, 1, 0, False
    fused = theirs.llama_flash_attn_type
    options.flash_attn_type = fused.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else fused.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    server = theirs.Server(options)
    prompt = [3 + position % (shape.vocabulary - 3) for position in range(context)]
    asked = {"prompt": prompt, "n_predict": TOKENS, "cache_prompt": True, "ignore_eos": True, "temperature": 0}
    server.handle_completions(asked)

    def call() -> object:
        timings = server.handle_completions(asked)["timings"]
        if timings["predicted_n"] != TOKENS or timings["prompt_n"] != 1:
            raise ValueError(f"asked for {TOKENS} tokens after a context that it keeps, it says {timings}")
        return timings

    return call


def beside(
    label: str,
    ours: Callable[[], object],
    kind: str,
    runs: int,
    context: int = 128,
    shape: Shape = PLAIN,
    flash: Sequence[bool] = (False, True),
) -> list[Row]:
    """Rows of a token: our step, and llama.cpp's in as large a file. A turn is `TOKENS` tokens of each.

    Args:
        flash: llama.cpp without fused attention, with it, or each as a side of its own.
    """
    case = f"a token after {context:,}, {label} and Llama, 406M parameters each, batch 1, {kind}"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "llama.gguf"
        write(path, kind, shape, context + 4 * TOKENS)

        def steps() -> None:
            for _ in range(TOKENS):
                ours()

        name = f"llama.cpp ({PACKAGE} {metadata.version(PACKAGE)}), {shape.kv_heads} of {shape.heads} heads"
        theirs = {False: name, True: f"{name}, flash attention"}
        sides = [Side(theirs[fused], decoding(path, shape, context, flash=fused)) for fused in flash]
        sides.insert(0, Side(OURS, steps))
        return [_of_a_token(row) for row in measure(case, sides, runs)]


def _of_a_token(row: Row) -> Row:
    times = (row.median_ms, row.fastest_ms, row.slowest_ms)
    median, fastest, slowest = (x / TOKENS for x in times)
    return replace(row, median_ms=median, fastest_ms=fastest, slowest_ms=slowest)


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    from openxlstm.bench.generate import large_model
    from openxlstm.infer.decoder import NativeDecoder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=("bf16", *BLOCKS), default=["q8_0"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128])
    parser.add_argument("--grouped", action="store_true", help="four queries share a key and a value")
    parser.add_argument(
        "--flash", choices=FLASH, default="both", help="llama.cpp's fused attention (both: its context is read twice)"
    )
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(words)
    if (reason := absent()) is not None:
        parser.error(reason)
    shape = GROUPED if options.grouped else PLAIN
    for kind in options.kinds:
        model = large_model(kind)
        step = partial(NativeDecoder(model, model.empty_state(1)).step, torch.tensor([5]))
        for context in options.contexts:
            rows = beside(model.config.label, step, kind, options.runs, context, shape, FLASH[options.flash])
            print(rows[0].case)
            for row in rows:
                took = f"{row.median_ms:.2f} ms ({row.fastest_ms:.2f} to {row.slowest_ms:.2f})"
                print(f"  {row.side}: {took}", flush=True)


if __name__ == "__main__":
    main()
