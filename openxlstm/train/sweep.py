"""A sweep: plain loops over values and seeds, one run folder each, one line of JSON per finished run.

OUT/  results.jsonl                  one line per finished run, in the order of the loops
      optim.lr=0.01,seed=0/          an ordinary run folder
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from openxlstm.data.tokens import write_atomically
from openxlstm.train.folder import default_cache
from openxlstm.train.log import Display, read_json
from openxlstm.train.loop import train
from openxlstm.train.report import SUMMARY
from openxlstm.train.run import read_recipe

RESULTS = "results.jsonl"
UNFINISHED = ("interrupted", "paused")  # endings of a run that the same command goes on with
MOST_NAME = 200  # bytes of a folder's name; file systems allow 255
Combination = Mapping[str, str]  # dotted key: value, as typed


def read_grid(said: Iterable[str]) -> dict[str, list[str]]:
    """`optim.lr=1e-2,1e-3` as key and values; commas inside brackets belong to a value.

    Raises:
        ValueError: no key, no value, or a key given twice.
    """
    grid: dict[str, list[str]] = {}
    for text in said:
        key, equals, values = text.partition("=")
        found = _split(values)
        if not equals or not key or not all(found):
            raise ValueError(f"--grid {text!r} must be KEY=VALUE,VALUE,... as in optim.lr=1e-2,1e-3")
        if key in grid or key == "train.seed":
            hint = "--seeds says how many" if key == "train.seed" else "list all of its values in one"
            raise ValueError(f"--grid {text!r}: {key} is given twice; {hint}")
        if len(set(found)) < len(found):
            raise ValueError(f"--grid {text!r} names a value twice; a second seed is --seeds 2")
        grid[key] = found
    return grid


def combinations(grid: Mapping[str, Sequence[str]], seeds: int) -> Iterator[tuple[dict[str, str], int]]:
    """Every combination with every seed; the last key varies fastest but for the seed."""
    for values in product(*grid.values()):
        for seed in range(seeds):
            yield dict(zip(grid, values, strict=True)), seed


def sweep(
    recipe: str,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[str]],
    seeds: int,
    out: Path,
    display: Display,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Train every combination that is not finished yet; returns a row per run, in the order of the loops.

    Every recipe of the grid is read before the first one is trained, so a mistake in the last does not cost the rest.
    An interrupted run ends the sweep; the same call goes on with it.

    Raises:
        ValueError: a recipe is wrong, or a run cannot begin.
    """
    jobs = []
    for values, seed in combinations(grid, seeds):
        said = [*overrides, *(f"{key}={value}" for key, value in values.items()), f"train.seed={seed}"]
        jobs.append((values, seed, out / folder_name(values, seed), *read_recipe(recipe, said)))
    rows: list[dict[str, Any]] = []
    for number, (values, seed, folder, resolved, tokenizer) in enumerate(jobs, start=1):
        display.note(f"run {number} of {len(jobs)}: {folder.name}")
        ending = train(resolved, tokenizer, folder, cache or default_cache(), display, _no_sample)
        rows.append(_row(values, seed, folder, ending))
        write_atomically(out / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
        if ending in UNFINISHED:
            break
    return rows


def folder_name(values: Combination, seed: int) -> str:
    """`optim.lr=1e-2,seed=0`: the folder says what is in it.

    Raises:
        ValueError: the values make a name that no file system takes.
    """
    name = ",".join([*(f"{key}={value}" for key, value in values.items()), f"seed={seed}"])
    if "/" in name or len(name.encode()) > MOST_NAME:
        raise ValueError(f"{name!r} cannot be the name of a folder; give such values in a recipe of their own")
    return name


def _row(values: Combination, seed: int, folder: Path, ending: str) -> dict[str, Any]:
    row: dict[str, Any] = {"run": folder.name, "values": dict(values), "seed": seed, "ending": ending}
    if ending in UNFINISHED:
        return row | {"step": 0, "seconds": 0.0, "valid_bits_per_byte": None}
    summary = read_json(folder / SUMMARY, "step", "seconds", "valid_bits_per_byte", "model")
    return row | {
        "step": summary["step"],
        "seconds": summary["seconds"],
        "valid_bits_per_byte": summary["valid_bits_per_byte"],
        "parameters": summary["model"]["parameters"],
    }


def _no_sample(model: Any, tokenizer: Any) -> str:
    """A sweep is read as a table."""
    return ""


def _split(values: str) -> list[str]:
    """At commas outside of brackets and quotes."""
    found, depth, quote = [""], 0, ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return found
