"""A GGUF file of any size with random weights, written a tensor at a time: the model never exists in memory.

    python -m openxlstm.bench.random_gguf xlstm-7b big.gguf --quant q8_0
    python -m openxlstm.bench.random_gguf xlstm-7b big.gguf --load      # and what loading it and a step of it take
    python -m openxlstm.bench.random_gguf xlstm-7b big.gguf --load --tokens 100000  # and a step after that many
    python -m openxlstm.bench.random_gguf xlstm-7b big.gguf --load --tokens 100000 --reader bf16    # read in bf16

Weights are drawn as the initialisation table of the 7B architecture has them in size, gates and biases included, so
that activations stay finite; a model of such weights writes noise. The tokenizer inside is the byte tokenizer.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from openxlstm.bench.generate import read_by_a_token
from openxlstm.bench.harness import OURS, Side, measure, reading
from openxlstm.checkpoint import gguf
from openxlstm.checkpoint.gguf_write import Quant, Report, check_target, write
from openxlstm.checkpoint.plan import Plan, identity, our_tensors
from openxlstm.checkpoint.sources import Entry, Source
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.infer.decoder import NativeDecoder, decoder
from openxlstm.infer.generate import PIECE
from openxlstm.models.accounting import Own
from openxlstm.models.interface import LanguageModel
from openxlstm.models.presets import PRESETS
from openxlstm.models.xlstm_large import xLSTMLargeConfig
from openxlstm.nn.init import forget_bias_per_head


def write_random(config: Own, target: Path, quant: Quant, *, seed: int = 0, repeat: bool = True) -> Report:
    """Write the file; its peak of memory is that of the largest tensor, a few times over.

    Args:
        repeat: draw 2^20 numbers per tensor and repeat them. Of the time of a 7B model, drawing is most.

    Raises:
        ValueError: the target is taken, or is no .gguf.
    """
    check_target(target, quant)
    entries = {
        name: Entry(tuple(tensor.shape), torch.float32, target, _drawn(name, tensor, config, seed, repeat))
        for name, tensor in our_tensors(config).items()
    }
    words = {gguf.TOKENIZER: Tokenizer.bytes().json, "tokenizer.ggml.eos_token_id": 256}
    return write(Plan("ours", config, identity(config)), Source(target, entries), target, quant, words)


def _drawn(name: str, like: Tensor, config: Own, seed: int, repeat: bool) -> Callable[[], Tensor]:
    shape, count = tuple(like.shape), like.numel()

    def read() -> Tensor:
        if re.search(r"(norm|skip)(\.weight)?$", name):
            return torch.ones(shape)
        if re.search(r"(gate_f|fgate_preact)\.bias$", name):
            return forget_bias_per_head(count)
        if name.endswith("igate_preact.bias"):
            return torch.full(shape, -10.0 if isinstance(config, xLSTMLargeConfig) else 0.0)
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        drawn = min(count, (1 << 20) + 1) if repeat else count  # odd, so that rows do not repeat each other
        numbers = torch.randn(drawn, generator=generator) * shape[-1] ** -0.5
        return numbers.repeat(-(-count // drawn))[:count].view(shape)

    return read


EARLY = 100  # tokens after which a step is compared with a later one


def measure_load(
    path: Path, rounds: int = 12, tokens: int | None = None, reader: torch.dtype | None = None
) -> dict[str, float]:
    """What a file takes to load and a token to decode: seconds, the share of what reading memory alone would take, and
    the process's peak of memory over the file.

    The first token brings the file into memory and does not count; the others are timed in turn with a read of memory
    beyond the caches, and medians count.

    Args:
        tokens: also read so many, and time a step after them in turn with a step after the first hundred: each of
            the two decoders has a state of its own, so that the minutes between are no part of the comparison.
        reader: they are read by an ordinary model of this dtype, made of the same file beside it. Where a processor has
            tiles, bf16 reads several times as fast as a file's blocks do. What is remembered is rounded a little
            differently then; what a step costs does not depend on it.

    Raises:
        ValueError: it cannot be loaded, or `tokens` are no more than that hundred.
    """
    if tokens is not None and tokens <= EARLY:
        raise ValueError(f"tokens={tokens} must be more than {EARLY}, after which the earlier step is timed")
    started = time.perf_counter()
    model = gguf.load(path, device="cpu", dtype=None)
    loaded = time.perf_counter()
    assert isinstance(model, torch.nn.Module), "what a GGUF file holds is a torch module"
    decode = decoder(model, model.empty_state(1))
    token = decode.step(torch.tensor([1])).argmax(-1)
    first, peak = time.perf_counter(), peak_memory()
    size, work = path.stat().st_size, read_by_a_token(model) / 1e9
    rows = measure("a token", [Side(OURS, lambda: decode.step(token))], rounds, work=work, ceiling=reading())
    seconds, share = rows[0].median_ms / 1e3, rows[0].of_ceiling
    assert share is not None, "there is a ceiling"
    later = {} if tokens is None else compare_later(model, tokens, rounds, path, reader)
    return {
        "load_seconds": loaded - started, "first_token_seconds": first - loaded, "seconds_per_token": seconds,
        "of_read_bandwidth": share, "file_bytes": size, "peak_bytes": peak, "peak_over_file": peak / size,
        **later,
    }  # fmt: skip


def compare_later(
    model: LanguageModel, tokens: int, rounds: int, path: Path, reader: torch.dtype | None
) -> dict[str, float]:
    """A step after `tokens` and one after the first hundred, in turn: seconds, and the first over the second.

    The tokens between are drawn, and read like a prompt, a piece at a time: a hundred thousand single steps of a 7B
    model are four hours. Where it is, is said on standard error. `path` and `reader` as in `measure_load`.
    """
    decode = NativeDecoder(model, model.empty_state(1))
    token = torch.tensor([1])
    for _ in range(EARLY):
        token = decode.step(token).argmax(-1)
    early, state = NativeDecoder(model, decode.state), decode.state
    between = torch.randint(model.config.vocab_size, (1, tokens - EARLY), generator=torch.Generator().manual_seed(0))
    reads = model if reader is None else gguf.load(path, device="cpu", dtype=reader)
    with torch.no_grad():
        for done in range(0, tokens - EARLY, PIECE):
            _, state = reads.features(between[:, done : done + PIECE], state)
            print(f"\r{min(done + PIECE + EARLY, tokens):,} of {tokens:,} tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    del reads
    late = NativeDecoder(model, state, copy=False)
    sides = [Side(OURS, lambda: late.step(token)), Side("early", lambda: early.step(token))]
    later, soon = measure("a token", sides, rounds)
    return {
        f"seconds_after_{EARLY}": soon.median_ms / 1e3, f"seconds_after_{tokens}": later.median_ms / 1e3,
        "later_over_earlier": later.median_ms / soon.median_ms,
    }  # fmt: skip


def peak_memory() -> int:
    """The most bytes that this process has had in memory (Linux), pages of mapped files included.

    Raises:
        ValueError: the system does not say.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError as error:
        raise ValueError(f"only Linux tells a process's peak of memory in /proc ({error})") from error
    assert found is not None, "VmHWM is in every Linux"
    return 1024 * int(found[1])


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description="Write a GGUF file of random weights.")
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("target", type=Path)
    parser.add_argument("--quant", choices=("q8_0", "q4_0", "q4_1", "bf16", "f32"), default="q8_0")
    parser.add_argument("--load", action="store_true", help="load what is there already, and measure that")
    parser.add_argument("--tokens", type=int, help="with --load: also time a step after so many tokens")
    parser.add_argument("--reader", choices=("fp32", "bf16"), help="with --tokens: who reads those before that step")
    options = parser.parse_args()
    if options.tokens is not None and not options.load:
        parser.error(f"--tokens {options.tokens} is about a file that is there: it needs --load")
    if options.reader is not None and options.tokens is None:
        parser.error(f"--reader {options.reader} says who reads tokens: it needs --tokens")
    if options.load:
        reader = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[options.reader]
        for name, value in measure_load(options.target, tokens=options.tokens, reader=reader).items():
            print(f"{name:18} {value:,.3f}")
        return
    started = time.perf_counter()
    report = write_random(PRESETS[options.preset].config, options.target, options.quant)
    print(f"{report.target}: {report.bytes:,} bytes in {time.perf_counter() - started:.0f} s, {report.kinds}, "
          f"peak memory {peak_memory():,} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
