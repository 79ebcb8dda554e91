"""`xlstm eval all`, and the table of README: what one command shows of every experiment."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from copy_task import EXPERIMENT, PLAN, line

from openxlstm.cli import experiments as cli
from openxlstm.cli import main
from openxlstm.experiments import corpora, grid, report, results, summary
from openxlstm.experiments.catalogue import EXPERIMENTS
from openxlstm.experiments.plans import Experiment
from openxlstm.experiments.results import Line, Metric
from openxlstm.tasks import images

ROOT = Path(__file__).parents[2]


def of(name: str, least: float = 0.9) -> Experiment:
    (rule,) = EXPERIMENT.rules["smoke"]
    return replace(EXPERIMENT, name=name, rules={"smoke": (replace(rule, at_least=least),)})


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Experiment]:
    """Two experiments of Copy, a view of the first one's runs, the one that reads pictures; runs cost nothing."""
    first, second = of("first"), of("second")
    found = {
        "first": first, "second": second, "view": replace(first, name="view", runs_of="first", rules={}),
        "cifar10": EXPERIMENTS["cifar10"],
    }  # fmt: skip
    monkeypatch.setattr(cli, "EXPERIMENTS", found)

    def once(run: grid.Run, work: Path) -> Line:
        facts = {"experiment": run.experiment, "model": run.model, "seed": run.seed, "rate": run.rate}
        return line(**facts, metrics={name: Metric(0.92, 9) for name in run.plan.metrics})

    monkeypatch.setattr(grid, "once", once)
    return found


def run(tmp_path: Path, *arguments: str) -> Result:
    file = str(tmp_path / "lines.jsonl")
    return CliRunner().invoke(main, ["eval", "all", "--profile", "smoke", "--results", file, "--jobs", "1", *arguments])


def test_all_runs_every_experiment_once_and_ends_with_a_total(tmp_path: Path, catalogue: dict[str, Experiment]) -> None:
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    assert len(results.read([tmp_path / "lines.jsonl"])) == 2 * 5, "the view has no runs of its own"
    assert "[10/10] second: " in done.output
    assert "cifar10: skipped: cifar10 reads the binary version of CIFAR-10" in done.output
    assert "4 experiments (2 reproduced, 1 skipped, 1 reported), 10 runs: 0.0 min" in done.output
    again = run(tmp_path)
    assert "10 of 10 runs are in" in again.output


def test_transformers_is_quiet_unless_somebody_wants_to_hear_it(
    tmp_path: Path, catalogue: dict[str, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    assert run(tmp_path).exit_code == 0
    assert (os.environ["HF_HUB_DISABLE_PROGRESS_BARS"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("1", "info")


def test_a_smoke_whose_rules_do_not_hold_fails(tmp_path: Path, catalogue: dict[str, Experiment]) -> None:
    catalogue["second"] = of("second", least=0.95)
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "rules of second do not hold" in done.output
    assert run(tmp_path, "--models", "mm").exit_code == 0, "of a part of the contestants nothing is judged"


def test_a_corpus_that_is_not_there_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = EXPERIMENTS["language-gcide"].profiles["smoke"]
    monkeypatch.setattr(corpora, "DICTIONARY", tmp_path / "none.dict.dz")
    assert plan.lacking == f"there is no {tmp_path / 'none.dict.dz'}: apt-get install dict-gcide"
    assert EXPERIMENTS["language-stdlib"].profiles["smoke"].lacking is None
    assert EXPERIMENTS["parity"].profiles["smoke"].lacking is None
    images._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "needs scikit-learn" in str(EXPERIMENTS["digits"].profiles["smoke"].lacking)
    refused = CliRunner().invoke(main, ["eval", "language-gcide", "--profile", "smoke"])
    assert refused.exit_code == 2
    assert "apt-get install dict-gcide" in refused.output


def test_the_table_of_readme_is_written_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    cpu = replace(EXPERIMENT, profiles={"smoke": PLAN, "cpu": PLAN}, rules={"cpu": EXPERIMENT.rules["smoke"]})
    runs = [line(profile="cpu", seed=seed, metrics={"short": Metric(value, 9)}) for seed, value in ((1, 0.8), (2, 0.9))]
    runs += [line(profile="cpu", model="llama", metrics={"short": Metric(0.4, 9)}), line(profile="smoke")]
    runs += [line(profile="cpu", model="floor", rate=0.0, seed=0, metrics={"short": Metric(0.33, 9)})]
    text = summary.table({"copy": cpu, "never": replace(cpu, name="never")}, runs)
    row = "[copy](docs/reproduction.md#copy), cpu | short, accuracy | 0.850 (2) | 0.330 | – | – | 0.400 (1) | not"
    assert text.splitlines()[2:] == [f"| {row} |"]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{summary.BEGIN}\nold\n{summary.END}\n\nafter\n")
    for _ in range(2):
        summary.replace(readme, text)
    assert readme.read_text() == f"before\n\n{summary.BEGIN}\n\n{text}\n{summary.END}\n\nafter\n"
    assert summary.part(readme.read_text()) == text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must have the line <!-- experiments: written by"):
        summary.replace(readme, text)


def test_the_verb_writes_the_table(tmp_path: Path, catalogue: dict[str, Experiment]) -> None:
    run(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"{summary.BEGIN}\n{summary.END}\n")
    done = CliRunner().invoke(main, ["eval", "report", str(tmp_path / "lines.jsonl"), "--readme", str(readme)])
    assert done.exit_code == 0, done.output
    assert summary.part(readme.read_text()) == "Nothing has been run yet.\n", "smoke runs are no results"


def test_every_number_of_readme_is_of_a_line() -> None:
    shown = summary.part((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = results.read(sorted((ROOT / "docs" / "results").glob("*.jsonl")))
    assert shown == summary.table(EXPERIMENTS, lines), "xlstm eval report docs/results/*.jsonl --readme README.md"


def test_every_number_of_the_page_is_of_a_line(tmp_path: Path) -> None:
    command = "xlstm eval report docs/results/cpu.jsonl --write docs/reproduction.md"
    lines = results.read([ROOT / "docs" / "results" / "cpu.jsonl"])
    shown = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert shown == report.page(EXPERIMENTS, lines, tmp_path / "images", command), command
    committed = {picture.name for picture in (ROOT / "docs" / "images").iterdir()}
    assert {picture.name for picture in (tmp_path / "images").iterdir()} <= committed
    assert "-0.000" not in shown, "nought has no sign"
