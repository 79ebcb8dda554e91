"""What the trainer costs beside the training: `python -m openxlstm.bench.overhead`.

A real run of about a million parameters, every step logged and drawn, goes through the trainer's own loop with
stopwatches on the forward pass, on the backward pass and on the optimiser's step. All the rest is overhead: waiting for
rows, the norm of the gradient and its clip, the guard, the journal, TensorBoard where it is asked for, the live view.
Evaluations and saves are apart; they happen when the recipe says so.
"""

from __future__ import annotations

import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from openxlstm.train.folder import default_cache
from openxlstm.train.log import Live
from openxlstm.train.loop import sit
from openxlstm.train.parallel import join
from openxlstm.train.run import Run, open_run, read_recipe

RECIPE = "stdlib-demo"
BOUND = 0.05  # of the step
WARM_UP = 5  # steps that allocate, import and fill caches


class Stopwatches:
    """Seconds per part, added up, and their state at the end of every step."""

    def __init__(self) -> None:
        self.parts = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}
        self.marks: list[tuple[float, dict[str, float]]] = []
        self._screen = Live(Console(file=io.StringIO(), force_terminal=True, width=100))

    def note(self, text: str) -> None:
        """As on a terminal."""
        self._screen.note(text)

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        """A step is over; the live view is drawn, to a terminal that nobody sees."""
        self._screen.step(line, end, seconds_left)
        self.marks.append((time.perf_counter(), dict(self.parts)))

    def close(self) -> None:
        """As on a terminal."""
        self._screen.close()

    @contextmanager
    def attached(self, run: Run) -> Iterator[None]:
        """Every forward pass, `backward` and optimiser's step of the block is timed."""
        plain_backward, plain_step = torch.Tensor.backward, run.optimiser.step
        began = [0.0]

        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                start = time.perf_counter()
                try:
                    return function(*args)
                finally:
                    self.parts[part] += time.perf_counter() - start

            return call

        def before(*_: Any) -> None:
            began[0] = time.perf_counter()

        def after(*_: Any) -> None:
            self.parts["forward"] += time.perf_counter() - began[0]

        hooks = (run.wrapped.register_forward_pre_hook(before), run.wrapped.register_forward_hook(after))
        torch.Tensor.backward = timed("backward", plain_backward)  # type: ignore[method-assign]
        run.optimiser.step = timed("optimiser", plain_step)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.backward = plain_backward  # type: ignore[method-assign]
            run.optimiser.step = plain_step  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    def steps(self) -> list[dict[str, float]]:
        """Seconds of every step after the warm-up: each part, and `other`."""
        found = []
        for (begin, first), (end, last) in zip(self.marks[WARM_UP:], self.marks[WARM_UP + 1 :], strict=False):
            parts = {name: last[name] - first[name] for name in self.parts}
            found.append(parts | {"other": end - begin - sum(parts.values())})
        return found


def measure(overrides: Sequence[str], steps: int) -> tuple[int, list[dict[str, float]]]:
    """Train `steps` steps in a folder that is then deleted. Returns the parameters, and seconds by part per step.

    Width 192 makes a million parameters; `overrides` may say otherwise.
    """
    said = {"model.width": "192", "train.max_minutes": "1000", "optim.schedule.warmup": "0", "evaluate.windows": "1"}
    said |= dict(text.split("=", 1) for text in overrides)
    said |= {"train.steps": f"{steps}", "evaluate.every": f"{steps + 1}", "checkpoint.every": f"{steps + 1}"}
    recipe, tokenizer = read_recipe(RECIPE, [f"{key}={value}" for key, value in said.items()])
    watches = Stopwatches()
    with tempfile.TemporaryDirectory(prefix="openxlstm-bench-") as place, join("single", None) as world:
        run = open_run(recipe, tokenizer, Path(place) / "run", default_cache(), world)
        run.folder.mkdir(parents=True, exist_ok=True)
        with watches.attached(run):
            sit(run, watches)
        watches.close()
        parameters = run.facts["model"]["parameters"]
    return parameters, watches.steps()


@click.command()
@click.option("--steps", type=click.IntRange(min=WARM_UP + 10), default=60, show_default=True, help="Steps to take.")
@click.option("--threads", default=0, help="Threads of the training; 0 for PyTorch's default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write every number to this file.")
@click.argument("overrides", nargs=-1, metavar="[TABLE.KEY=VALUE]...")
def main(steps: int, threads: int, json_file: Path | None, overrides: tuple[str, ...]) -> None:
    """Measure what the trainer adds to forward pass, backward pass and optimiser."""
    if threads:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    parameters, found = measure(overrides, steps)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"{parameters:,} parameters, {len(found)} steps after {WARM_UP}; {machine}")
    whole = [sum(parts.values()) for parts in found]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "median ms", "share"):
        table.add_column(column, justify="right" if column else "left")
    for name in found[0]:
        share = sum(parts[name] for parts in found) / sum(whole)
        label = "everything else" if name == "other" else name
        table.add_row(label, f"{1000 * median(parts[name] for parts in found):.2f}", f"{100 * share:.2f} %")
    table.add_section()
    table.add_row("step", f"{1000 * median(whole):.2f}", "100 %")
    console.print(table)
    overhead = sum(parts["other"] for parts in found) / sum(whole)
    verdict = "below" if overhead < BOUND else "ABOVE"
    console.print(f"overhead {100 * overhead:.2f} % of the step, {verdict} the {100 * BOUND:g} % that are allowed")
    if json_file is not None:
        facts = {"machine": machine, "parameters": parameters, "overhead": overhead, "steps": found}
        json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
