"""`xlstm eval`: a trained model on the tasks of lm-eval; an experiment of the papers; the report of experiments."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType

import click

from openxlstm.cli import experiments
from openxlstm.cli.common import model_folder, show_json, show_table


@click.command("eval", short_help="Evaluate a model, or rerun an experiment of the papers.")
@click.argument("path", metavar="PATH|EXPERIMENT|list|report", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--profile", type=click.Choice(experiments.PROFILES), help="Of an experiment: how much of it is run.")
@click.option("--models", help="Of an experiment: only these contestants, with commas between them.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), default=experiments.RESULTS,
              show_default=True, help="Of an experiment: the file that its runs are appended to.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1),
              help="Of an experiment: runs side by side.  [default: one per core; on a GPU 1]")  # fmt: skip
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/reproduction.md"),
              show_default=True, help="Of report: the page; its pictures go into images/ beside it.")  # fmt: skip
@click.option("--tasks", help="Names of tasks, with commas between them.")
@click.option("--include-path", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="A folder of task files (YAML); only its tasks are known then.")  # fmt: skip
@click.option("--limit", type=int, help="Only the first N examples of each task: to try things out.")
@click.option("--num-fewshot", type=int, help="Solved examples before each question.  [default: as the task says]")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Requests computed together.")
@click.option("--rolling", type=click.Choice(("stateful", "windows")), default="stateful", show_default=True,
              help="Perplexities: carry the state through a whole text, or start afresh in every window.")  # fmt: skip
@click.option("--window", type=int, default=2048, show_default=True, help="Tokens in a window of --rolling windows.")
@click.option("--bos/--no-bos", default=True, show_default=True, help="The end token before every context.")
@click.option("--device", help="Where to compute, such as cuda:1.  [default: an accelerator if there is one]")
@click.option("--dtype", help="Compute in float32, bfloat16, ...  [default: as saved]")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write all results to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def eval(
    path: Path,
    files: tuple[Path, ...],
    profile: str | None,
    models: str | None,
    results: Path,
    jobs: int | None,
    write: Path,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    rolling: str,
    window: int,
    bos: bool,
    device: str | None,
    dtype: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate a model on tasks, or rerun an experiment of the papers.

    A model: PATH, a model folder, a run folder or a GGUF file, on the --tasks of lm-eval. Tasks come with lm-eval,
    which loads their data from the Hugging Face hub (HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1 forbid it), or from
    your own files: docs/evaluation.md shows how.

    \b
      xlstm eval runs/demo --tasks lambada_openai,piqa --limit 100
      xlstm eval runs/demo --tasks my_task --include-path my_tasks --json

    An experiment: by its name, in a --profile from a minute on a laptop (smoke) to the published setting (paper). Runs
    that are in the file already are not made again, so the same command goes on where it was interrupted.

    \b
      xlstm eval list
      xlstm eval parity --profile smoke
      xlstm eval report runs/eval/results.jsonl --write page.md
    """
    word = str(path)
    if experiments.is_experiment(word):
        if word == "list":
            experiments.show_list()
        elif word == "report":
            experiments.report(files, write)
        else:
            experiments.run(word, profile, models.split(",") if models else (), results, jobs, as_json)
        return
    if not path.exists():
        raise ValueError(experiments.refuse(word))
    if tasks is None:
        raise ValueError("say what to evaluate the model on with --tasks")
    folder = model_folder(path)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    adapter = _adapter()
    manager = adapter.task_manager(names, include_path)
    lm = adapter.OpenXLSTMLM(
        str(folder), batch_size=batch_size, device=device, dtype=dtype, rolling=rolling, window=window, bos=bos
    )
    found = adapter.run(lm, names, manager, limit=limit, num_fewshot=num_fewshot)
    answer = {
        "model": str(folder), "rolling": rolling, "bos": lm.bos, "limit": limit,
        **{key: found[key] for key in ("results", "versions", "n-shot", "n-samples")},
    }  # fmt: skip
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**answer, "configs": found["configs"]}, indent=2, default=str) + "\n")
    if as_json:
        show_json(json.loads(json.dumps(answer, default=str)))
        return
    rows = [
        (task, metric.removesuffix(",none"), f"{value:.4f}", answer["n-samples"].get(task, {}).get("effective", ""))
        for task, metrics in answer["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    ]
    show_table(f"{folder}", ("task", "metric", "value", "examples"), rows, numbers=(2, 3))


def _adapter() -> ModuleType:
    try:
        from openxlstm.tasks import lm_eval
    except ModuleNotFoundError as error:
        raise ValueError(f"xlstm eval needs lm-eval ({error}); pip install 'openxlstm[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its progress would stand between our lines
    return lm_eval
