"""`report.md`: what was trained, on what, how it went, and what it is worth. Made from the run folder alone."""

import shlex
from pathlib import Path
from typing import Any

from openxlstm.data.corpus import STDLIB
from openxlstm.data.tokens import write_atomically
from openxlstm.train.log import clock, counted, read_journal, read_json

SUMMARY = "summary.json"


def write_report(folder: Path) -> Path:
    """Write the report of a finished run and its pictures. Returns the path of the report.

    Without matplotlib (the extra `report`) the pictures are left out, and the report says how to get them.
    """
    summary, resolved = read_json(folder / SUMMARY), read_json(folder / "resolved.json")
    lines = read_journal(folder / "train.jsonl")
    try:
        pictures = _pictures(folder, lines, summary)
        write_atomically(folder / "report.md", _text(folder, summary, resolved["recipe"], pictures))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {SUMMARY} or resolved.json lacks a field or has a wrong one: {error}") from error
    return folder / "report.md"


def _pictures(folder: Path, lines: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    if not any("loss" in line for line in lines):
        return "*No pictures: `train.jsonl` holds no step.*"
    try:
        from openxlstm.train import plots
    except ImportError:
        return "*No pictures: they need matplotlib. `pip install 'openxlstm[report]'`, and the same command again.*"
    plots.draw(folder, lines, summary["yardsticks"], summary["held_out"]["bits_per_byte"])
    return "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in plots.NAMES)


def _text(folder: Path, summary: dict[str, Any], recipe: dict[str, Any], pictures: str) -> str:
    held_out, model, machine = summary["held_out"], summary["model"], summary["machine"]
    title = " ".join(summary["title"].split()) or folder.resolve().name
    prompt = "import " if summary["data"]["corpus"] == STDLIB else "The "
    return f"""# {title}

**{held_out["bits_per_byte"]:.3f} bits per byte** on {held_out["bytes"]:,} bytes of held-out text \
({counted(summary["data"]["test_documents"], "document")} that training never sees), \
after {clock(summary["seconds"])} of training.{_cut(summary, recipe)}

{_comparison(summary["yardsticks"], held_out["bits_per_byte"])}

The model is scored in windows of {held_out["context"]} tokens, each from an empty state; document ends do not count.\
{_about_yardsticks(summary["yardsticks"])}

## How it went

{pictures}

## What it writes

{_fenced(summary["sample"])}

## What it is

| | |
|---|---|
| model | {model["label"]}, {model["parameters"]:,} parameters |
| memory of the past | {model["state_bytes"]:,} bytes per sequence, however long |
| work | {model["flops_per_token"]:,.0f} FLOPs per token forward |
| training | {summary["step"]:,} steps of {recipe["train"]["batch"]} x {recipe["data"]["context"]} tokens, \
{summary["tokens"]:,} in all ({summary["tokens"] / summary["data"]["train_tokens"]:.2f} epochs) |
| best validation | {_number(summary["valid_bits_per_byte"])} bits per byte, on a part of the validation split |
| corpus | {summary["data"]["corpus"]}, train `{summary["data"]["fingerprint"]["train"][:16]}`, \
test `{summary["data"]["fingerprint"]["test"][:16]}` |
| precision | {machine["precision"]}, {counted(machine["threads"], "thread")} |
| machine | {machine["device"]}, {machine["system"]} |
| versions | openxlstm {machine["openxlstm"]}, torch {machine["torch"]}, numpy {machine["numpy"]}, \
Python {machine["python"]} |

Only results with equal fingerprints may be compared. Everything the run was told is in `resolved.json`, every step in \
`train.jsonl`.

## What to do next

```sh
xlstm generate {shlex.quote(str(folder))} --prompt {prompt!r} --temperature 0.7
```
"""


def _cut(summary: dict[str, Any], recipe: dict[str, Any]) -> str:
    """What became of the steps that the recipe asked for, if it was not all of them."""
    asked, minutes = recipe["train"]["steps"], recipe["train"]["max_minutes"]
    if summary["ending"] != "done":
        return f" The run ended early: it was {summary['ending']}, at step {summary['step']:,} of {asked:,}."
    if summary["step"] < asked:
        return f" To end within {minutes:g} min, it cooled down early and took {summary['step']:,} of {asked:,} steps."
    return ""


def _comparison(yardsticks: dict[str, float], model: float) -> str:
    """All numbers in one table, the worst first, so that the model's place among them can be seen."""
    if not yardsticks:
        return "The recipe asked for no yardsticks, or the training text is too large for n-grams in memory."
    rows = sorted([*yardsticks.items(), ("**this model**", model)], key=lambda row: -row[1])
    lines = [f"| {name} | {f'**{bits:.3f}**' if name.startswith('**') else f'{bits:.3f}'} |" for name, bits in rows]
    return "\n".join(["| on the same held-out bytes | bits per byte |", "|---|--:|", *lines])


def _about_yardsticks(yardsticks: dict[str, float]) -> str:
    """How the other numbers of the table came about."""
    if not yardsticks:
        return ""
    return (
        " The n-grams (interpolated, Witten-Bell) are fitted on the same training text and keep their context through"
        " a whole document; the compressors have seen nothing before the held-out text."
    )


def _fenced(text: str) -> str:
    """A code block that the text cannot end, whatever it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
