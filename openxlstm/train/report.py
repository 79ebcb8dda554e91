"""`report.md`: what was trained, on what, how it went, and what it is worth. Made from the run folder alone."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from openxlstm.data.corpus import STDLIB
from openxlstm.data.tokens import write_atomically
from openxlstm.train.log import clock, counted, read_journal, read_json

SUMMARY = "summary.json"
TROUBLE = ("spike", "skip", "rollback", "stop")  # events of the guard
MOST_EVENTS = 20  # in the report; events.jsonl has all
Line = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write the report of a finished run and its pictures. Returns the path of the report.

    Without matplotlib (the extra `report`) the pictures are left out, and the report says how to get them.
    """
    summary, resolved = read_json(folder / SUMMARY), read_json(folder / "resolved.json")
    lines, events = read_journal(folder / "train.jsonl"), read_journal(folder / "events.jsonl")
    try:
        pictures = _pictures(folder, lines, events, summary, resolved["recipe"])
        write_atomically(folder / "report.md", _text(folder, summary, resolved["recipe"], lines, events, pictures))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {SUMMARY} or resolved.json lacks a field or has a wrong one: {error}") from error
    return folder / "report.md"


def _pictures(folder: Path, lines: Sequence[Line], events: Sequence[Line], summary: Line, recipe: Line) -> str:
    if not any(line.get("loss") is not None for line in lines):
        return "*No pictures: `train.jsonl` holds no step.*"
    try:
        from openxlstm.train import plots
    except ImportError:
        return "*No pictures: they need matplotlib. `pip install 'openxlstm[report]'`, and the same command again.*"
    held_out = summary["held_out"]
    bits, context = None if held_out is None else held_out["bits_per_byte"], recipe["data"]["context"]
    names = plots.draw(folder, lines, summary["yardsticks"], bits, events, context)
    return "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in names)


def _text(
    folder: Path, summary: Line, recipe: Line, lines: Sequence[Line], events: Sequence[Line], pictures: str
) -> str:
    model, machine, data = summary["model"], summary["machine"], summary["data"]
    title = " ".join(summary["title"].split()) or folder.resolve().name
    prompt = "import " if data["corpus"] == STDLIB else "The "
    return f"""# {title}

{_result(summary)}{_cut(summary, recipe)}

{_comparison(summary)}

## How it went

{pictures}

{_speed(lines)}{_trouble(lines, events)}{_elsewhere(lines)}{_contexts(lines)}
## What it writes

{_fenced(summary["sample"])}

{_samples(lines)}## What it is

| | |
|---|---|
| model | {model["label"]}, {model["parameters"]:,} parameters |
| memory of the past | {model["state_bytes"]:,} bytes per sequence, however long |
| work | {model["flops_per_token"]:,.0f} FLOPs per token forward |
| training | {summary["step"]:,} steps of {_batch(recipe)} x {recipe["data"]["context"]} tokens, \
{summary["tokens"]:,} in all ({summary["tokens"] / data["train_tokens"]:.2f} epochs) |
| best validation | {_number(summary["valid_bits_per_byte"])} bits per byte, on a part of the validation split |
| corpus | {data["corpus"]}, {_fingerprints(data["fingerprint"])} |
| precision | {machine["precision"]}, {counted(machine["threads"], "thread")} |
| machine | {machine["device"]}, {machine["system"]} |
| versions | openxlstm {machine["openxlstm"]}, torch {machine["torch"]}, numpy {machine["numpy"]}, \
Python {machine["python"]} |

Only results with equal fingerprints may be compared. Everything the run was told is in `resolved.json`, every step in \
`train.jsonl`, everything that happened to it in `events.jsonl`.

## What to do next

```sh
xlstm generate {shlex.quote(str(folder))} --prompt {prompt!r} --temperature 0.7
```
"""


def _result(summary: Line) -> str:
    held_out, time = summary["held_out"], clock(summary["seconds"])
    if held_out is None:
        return (
            f"**{_number(summary['valid_bits_per_byte'])} bits per byte** at best on the validation windows, after"
            f" {time} of training. The data have no test split, so nothing was kept for the very end."
        )
    return (
        f"**{held_out['bits_per_byte']:.3f} bits per byte** on {held_out['bytes']:,} bytes of held-out text"
        f" ({counted(summary['data']['test_documents'], 'document')} that training never sees), after {time} of"
        " training."
    )


def _cut(summary: Line, recipe: Line) -> str:
    """What became of the steps that the recipe asked for, if it was not all of them."""
    asked, minutes = recipe["train"]["steps"], recipe["train"]["max_minutes"]
    if summary["ending"] != "done":
        return f" The run ended early: it was {summary['ending']}, at step {summary['step']:,} of {asked:,}."
    if summary["step"] < asked:
        return f" To end within {minutes:g} min, it cooled down early and took {summary['step']:,} of {asked:,} steps."
    return ""


def _comparison(summary: Line) -> str:
    """All numbers in one table, the worst first, so that the model's place among them can be seen; and their rules."""
    yardsticks, held_out = summary["yardsticks"], summary["held_out"]
    if held_out is None:
        return "Yardsticks need a test split."
    how = (
        f"The model is scored in windows of {held_out['context']} tokens, each from an empty state; document ends do"
        " not count."
    )
    if not yardsticks:
        return f"The recipe asked for no yardsticks, or the training text is too large for n-grams in memory. {how}"
    rows = sorted([*yardsticks.items(), ("**this model**", held_out["bits_per_byte"])], key=lambda row: -row[1])
    table = [(name, f"**{bits:.3f}**" if name.startswith("**") else f"{bits:.3f}") for name, bits in rows]
    return (
        f"{_table(('on the same held-out bytes', 'bits per byte'), table)}\n\n{how} The n-grams (interpolated,"
        " Witten-Bell) are fitted on the same training text and keep their context through a whole document; the"
        " compressors have seen nothing before the held-out text."
    )


def _speed(lines: Sequence[Line]) -> str:
    """What the meters said, over all sittings: medians, and the largest memory."""
    seen = [line for line in lines if "tokens_per_second" in line]
    if not seen:
        return ""
    rate = median(line["tokens_per_second"] for line in seen)
    said = [f"{rate:,.0f} tokens per second in the median"]
    for name, words in (("mfu", "of the device's peak"), ("data_wait", "of the time spent waiting for data")):
        if values := [line[name] for line in seen if name in line]:
            said.append(f"{100 * median(values):.1f} % {words}")
    if memory := [max(line["memory"].values()) for line in seen if "memory" in line]:
        said.append(f"{max(memory) / 2**30:.2f} GiB of memory at most")
    return f"{', '.join(said)}.\n\n"


def _trouble(lines: Sequence[Line], events: Sequence[Line]) -> str:
    """Every intervention of the guard: a step that was skipped is part of the result."""
    found = [event for event in events if event.get("event") in TROUBLE]
    skipped = sum("skipped" in line for line in lines)
    if not found and not skipped:
        return "Every step was taken: the guard saw no spike and no number that is none.\n"
    counts = {name: sum(event["event"] == name for event in found) for name in TROUBLE}
    said = ", ".join(counted(count, name) for name, count in counts.items() if count)
    rows = [(f"{event['step']:,}", event["event"], event.get("reason", "")) for event in found[:MOST_EVENTS]]
    more = f"\n\nThe first {MOST_EVENTS} of {len(found)}; `events.jsonl` has all." if len(found) > MOST_EVENTS else ""
    return (
        f"**The guard intervened**: {said}. Of the steps that count, {skipped:,} were skipped.\n\n"
        f"{_table(('step', 'what was done', 'why'), rows)}{more}\n"
    )


def _elsewhere(lines: Sequence[Line]) -> str:
    """The last measurement on further validation sets."""
    last = next((line["sets"] for line in reversed(lines) if line.get("sets")), None)
    if last is None:
        return ""
    rows = [(name, f"{score['bits_per_byte']:.3f}") for name, score in sorted(last.items())]
    return f"\n{_table(('further validation set', 'bits per byte'), rows)}\n"


def _contexts(lines: Sequence[Line]) -> str:
    """The last measurement by length of context."""
    last = next((line["lengths"] for line in reversed(lines) if line.get("lengths")), None)
    if last is None:
        return ""
    rows = [(f"{row['length']:,}", f"{row['bits_per_byte']:.3f}") for row in last]
    table = _table(("tokens in a row, on the same validation targets", "bits per byte"), rows)
    return f"\n{table}\n"


def _samples(lines: Sequence[Line]) -> str:
    """What it wrote at the last validation, if it was asked to."""
    last = next((line for line in reversed(lines) if line.get("samples")), None)
    if last is None:
        return ""
    texts = "\n\n".join(_fenced(sample["prompt"] + sample["text"]) for sample in last["samples"])
    return f"At step {last['step']:,} it continued the prompts of the recipe so:\n\n{texts}\n\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown; everything but the first column flush right, unless it is a sentence."""
    align = ["---" if index == 0 or name == "why" else "--:" for index, name in enumerate(head)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), align, *cells])


def _batch(recipe: Line) -> str:
    """`8`, or `128 to 512` for a ramp."""
    batch = recipe["train"]["batch"]
    return str(batch) if isinstance(batch, int) else f"{batch[0][1]} to {batch[-1][1]}"


def _fingerprints(said: Mapping[str, str]) -> str:
    return ", ".join(f"{name} `{fingerprint[:16]}`" for name, fingerprint in said.items())


def _fenced(text: str) -> str:
    """A code block that the text cannot end, whatever it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
