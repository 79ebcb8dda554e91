"""`xlstm generate`: continue a text with a trained model."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

import click

from openxlstm.cli.common import model_folder, show_json, tokenizer_of

# A model of bytes may write ESC; a terminal would obey it. Shown as the picture of the character: ␛
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@click.command(short_help="Continue a text with a trained model.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="The beginning of the text; - reads it from standard input.")
@click.option("-n", "--max-tokens", type=int, default=200, show_default=True, help="Write at most this many tokens.")
@click.option("-t", "--temperature", type=float, default=1.0, show_default=True,
              help="Below 1 is bolder, above 1 wilder; 0 takes the most probable token.")  # fmt: skip
@click.option("--top-k", type=int, help="Choose among the K most probable tokens only.")
@click.option("--top-p", type=float, help="Choose among the most probable tokens that together hold this share.")
@click.option("--min-p", type=float, help="Leave out tokens less than this share as probable as the best one.")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens that have appeared become less likely.")
@click.option("--stop", multiple=True, help="End before this string appears. May be given several times.")
@click.option("--seed", type=int, help="The same seed writes the same text; --json tells the one that was used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the text is finished.")
def generate(
    path: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: tuple[str, ...],
    seed: int | None,
    as_json: bool,
) -> None:
    """Continue a text with the model in PATH: a folder that `xlstm train` or `openxlstm.save` wrote, or
    a GGUF file of `xlstm convert`.

    The prompt and its continuation appear as they are written; the summary after them goes to standard error, so
    that a pipe receives the text and nothing else. Memory does not grow with the length of the text.

    \b
      xlstm generate runs/demo --prompt 'class Parser:' --temperature 0.7
      head -30 setup.py | xlstm generate runs/demo --prompt - --max-tokens 500 --stop 'def '
    """
    from openxlstm.checkpoint.store import load
    from openxlstm.infer.generate import pieces, prompt_ids
    from openxlstm.infer.sampling import Sampling

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    folder = model_folder(path)
    tokenizer = tokenizer_of(folder)
    model = load(folder).eval()
    prompt = _read_standard_input() if prompt == "-" else prompt
    seed = secrets.randbits(32) if seed is None else seed

    began = time.perf_counter()
    text, count, finished = "", 0, None
    found = pieces(model, tokenizer, [prompt], sampling, max_tokens=max_tokens, stop=stop, seed=seed)
    if not as_json:
        _write(prompt, bold=True)
    for piece in found:
        text, count, finished = text + piece.text, count + 1, piece.finished
        if not as_json:
            _write(piece.text)
    seconds = time.perf_counter() - began

    if as_json:
        show_json({
            "prompt": prompt, "text": text, "finished": finished, "seed": seed, "tokens": count,
            "prompt_tokens": len(prompt_ids(model, tokenizer, prompt)), "seconds": round(seconds, 3),
        })  # fmt: skip
    else:
        click.echo()
        if sys.stderr.isatty():
            click.secho(f"{count} tokens in {seconds:.1f} s, finished by {finished}, seed {seed}", dim=True, err=True)


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on standard input is not UTF-8 text: {error}") from None


def _write(text: str, bold: bool = False) -> None:
    """Show text at once; on a terminal no character of it is a command to the terminal."""
    if sys.stdout.isatty():
        text = text.translate(VISIBLE)
    click.echo(click.style(text, bold=True) if bold else text, nl=False)
