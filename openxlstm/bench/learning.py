"""Does it learn, and beside what? One loop, one budget, two models, real text: `python -m openxlstm.bench.learning`.

    python -m openxlstm.bench.learning stdlib dict=data/gcide/gcide.txt --out runs/learning --write docs/learning.md

For every corpus, the xLSTM and the Llama of the recipes `learning-*` (equal parameters within 2 %, equal tokens in
equal order) are tuned alike: three rates, 80 steps each, and a further rate as long as the best one is at an edge. Each
then trains at its best rate by validation. What is finished is not trained again; the
page is made from the run folders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openxlstm.train.folder import default_cache
from openxlstm.train.log import Display, Silent
from openxlstm.train.loop import train
from openxlstm.train.run import read_recipe
from openxlstm.train.sweep import RESULTS, sweep

MODELS = ("xlstm", "llama")
RATES = ("1e-3", "2e-3", "4e-3")  # to begin with
LOWER = {"1e-3": "5e-4", "5e-4": "2.5e-4", "2.5e-4": "1.25e-4"}
HIGHER = {"4e-3": "8e-3", "8e-3": "1.6e-2"}
TUNING = 80  # steps a rate


def check(
    corpus: str, model: str, folder: Path, display: Display, rate: str | None = None, steps: int | None = None
) -> str:
    """Tune one model on one corpus, and train it at its best rate, which is returned. Continues what was interrupted.

    Args:
        rate: one that was tuned on another corpus; then nothing is tuned.
        steps: of the training; None for the recipe's.

    Raises:
        ValueError: the corpus or the folder cannot be used.
    """
    overrides = [f"data.corpus={json.dumps(corpus)}"]
    rates, best = list(RATES), rate
    while best is None:
        tuning = [*overrides, f"train.steps={TUNING}", f"evaluate.every={TUNING // 2}"]
        rows = sweep(f"learning-{model}", tuning, {"optim.lr": rates}, 1, folder / "tune", display)
        found = chosen(rows)
        further = LOWER.get(found) if found == rates[0] else HIGHER.get(found) if found == rates[-1] else None
        if further is None:
            best = found
        else:
            rates = [further, *rates] if found == rates[0] else [*rates, further]
    length = [] if steps is None else [f"train.steps={steps}"]
    recipe, tokenizer = read_recipe(f"learning-{model}", [*overrides, f"optim.lr={best}", *length])
    train(recipe, tokenizer, folder / f"final-{best}", default_cache(), display, lambda *_: "")
    return best


def chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rate of the lowest validation."""
    finished = [row for row in rows if row["valid_bits_per_byte"] is not None]
    return min(finished, key=lambda row: row["valid_bits_per_byte"])["values"]["optim.lr"]


def page(out: Path, pictures: Path, command: str) -> str:
    """docs/learning.md of everything under `out`, whose folders are CORPUS-MODEL; draws into `pictures`.

    Raises:
        ValueError: there is no finished run.
    """
    corpora: dict[str, dict[str, dict[str, Any]]] = {}
    for summary in sorted(out.glob("*-*/final-*/summary.json")):
        corpus, model = summary.parents[1].name.rsplit("-", 1)
        results = summary.parents[1] / "tune" / RESULTS
        tuned = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        if tuned and summary.parent.name != f"final-{chosen(tuned)}":
            continue  # of a grid that has been extended since
        lines = [json.loads(line) for line in (summary.parent / "train.jsonl").read_text().splitlines()]
        corpora.setdefault(corpus, {})[model] = {
            **json.loads(summary.read_text()), "tuned": tuned, "lines": lines,
            "rate": summary.parent.name.removeprefix("final-"),
        }  # fmt: skip
    if not corpora:
        raise ValueError(f"{out} holds no finished run; the folders are CORPUS-MODEL/final-RATE")
    return "\n".join(_page(corpora, pictures, command)) + "\n"


def _page(corpora: Mapping[str, Mapping[str, Any]], pictures: Path, command: str) -> Iterator[str]:
    yield "# The learning check"
    yield ""
    yield f"Written by `{command}`; no number on this page is typed."
    yield ""
    yield "Does an xLSTM of some five million parameters learn real text in minutes on a CPU, and what does a Llama of"
    yield "equal size do with the same? Bytes, one loop, the same tokens in the same order, rates tuned alike and"
    yield "chosen by the validation windows; the test figure is that of the run at the chosen rate. One seed: a"
    yield "difference that a second seed could turn round is no finding. Of so few tokens neither model is near what it"
    yield "can do, and which of two architectures learns faster at the start says nothing about a long training."
    for corpus, models in sorted(corpora.items(), reverse=True):
        first = next(iter(models.values()))
        yield ""
        yield f"## {corpus}"
        yield ""
        yield f"{first['data']['train_tokens']:,} training tokens there are; {first['tokens']:,} were read, in"
        yield f"{first['step']} steps. Fingerprint of the test split: `{first['data']['fingerprint']['test'][:16]}`."
        yield ""
        yield "| | parameters | rate (validation after tuning) | validation | test, bits per byte |"
        yield "|---|---|---|---|---|"
        for model in MODELS:
            if model not in models:
                continue
            found = models[model]
            tried = ", ".join(f"{row['values']['optim.lr']} {row['valid_bits_per_byte']:.3f}" for row in found["tuned"])
            yield (
                f"| {found['model']['label']} | {found['model']['parameters']:,} | **{found['rate']}** "
                f"({tried or 'tuned on another corpus'}) | "
                f"{found['valid_bits_per_byte']:.3f} | **{found['held_out']['bits_per_byte']:.3f}** |"
            )
        for name, value in first["yardsticks"].items():
            yield f"| {name} | | | | {value:.3f} |"
        yield ""
        yield f"![Validation over steps, {corpus}](images/{draw(corpus, models, pictures)})"
    said = next(iter(next(iter(corpora.values())).values()))["machine"]
    yield ""
    yield f"{said['system']}, {said['device']}, {said['threads']} thread, torch {said['torch']}, {said['precision']}."


def draw(corpus: str, models: Mapping[str, Any], folder: Path) -> str:
    """The validation curves beside the yardsticks; returns the file's name. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained", dpi=130)
    axes = figure.subplots()
    colours = {"xlstm": "#d1495b", "llama": "#3d7ea6"}
    for model, found in models.items():
        measured = [line for line in found["lines"] if "valid_bits_per_byte" in line]
        steps, values = [line["step"] for line in measured], [line["valid_bits_per_byte"] for line in measured]
        label = f"{found['model']['label']}, {found['model']['parameters'] / 1e6:.2f}M"
        axes.plot(steps, values, color=colours[model], marker="o", markersize=3.5, linewidth=1.8, label=label)
        axes.annotate(
            f"{values[-1]:.2f}", (steps[-1], values[-1]), xytext=(6, -3), textcoords="offset points",
            color=colours[model], fontsize=9,
        )  # fmt: skip
    axes.set_title(f"Validation, {corpus}", loc="left", fontsize=11, fontweight="bold", color="#1f2933")
    axes.set_xlabel("steps of 2,048 bytes", color="#7b8794")
    axes.set_ylabel("bits per byte", color="#7b8794")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#d9dee3", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors="#7b8794", length=0)
    axes.legend(frameon=False, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"learning-{corpus}.png"
    figure.savefig(folder / name)
    return name


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description="Train an xLSTM and a Llama of equal size alike, and compare them.")
    parser.add_argument("corpora", nargs="*", metavar="NAME[=PATH]", help="stdlib, or a name and a file or folder")
    parser.add_argument("--tune-once", action="store_true", help="tune on the first corpus; its rates serve the others")
    parser.add_argument("--steps", type=int, help="of the training at the best rate  [default: the recipes']")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--write", type=Path, help="write the page, and its pictures into images/ beside it")
    options = parser.parse_args()
    rates: dict[str, str] = {}
    for said in options.corpora:
        name, _, path = said.partition("=")
        for model in MODELS:
            rate = rates.get(model) if options.tune_once else None
            rates[model] = check(path or name, model, options.out / f"{name}-{model}", Silent(), rate, options.steps)
    if options.write is not None:
        command = "python -m openxlstm.bench.learning " + " ".join(sorted(_names(options.out), reverse=True))
        options.write.write_text(page(options.out, options.write.parent / "images", command), encoding="utf-8")
        print(options.write)


def _names(out: Path) -> set[str]:
    """As the command would be typed: a corpus that is no shipped one is NAME=PATH."""
    names = {folder.name.rsplit("-", 1)[0] for folder in out.glob("*-*")}
    return {name if name == "stdlib" else f"{name}=PATH" for name in names}


if __name__ == "__main__":
    main()
