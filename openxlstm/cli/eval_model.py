"""`xlstm eval PATH`: a trained model on the tasks of lm-eval, or on local texts and questions (eval_text.py)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from openxlstm.cli.common import model_folder, show_json, show_table


@click.command("model", short_help="A trained model: perplexity, length, choices, tasks of lm-eval. `xlstm eval PATH`")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tasks", help="Names of tasks of lm-eval, with commas between them.")
@click.option("--perplexity", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Texts in JSONL (also .gz, .zst) with `source` and `domain`: perplexity of each.")  # fmt: skip
@click.option("--choice", multiple=True, metavar="TASK=FILE",
              help="One of six downstream tasks with its rows in JSONL, without lm-eval; may be repeated.")  # fmt: skip
@click.option("--extrapolate", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Texts in JSONL: loss beyond the length that the model was trained at.")  # fmt: skip
@click.option("--train-length", type=int, help="That length, in tokens.")
@click.option("--factors", default="1,2,4,8", show_default=True, help="Lengths to test, in trained lengths.")
@click.option("--seen", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Token folder of the training split: --perplexity by how often the target was seen.")  # fmt: skip
@click.option("--rows", type=click.Path(path_type=Path, file_okay=False),
              help="Keep a line per document or question in this folder, and go on from there.")  # fmt: skip
@click.option("--against", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="The --rows folder of another model: compare on the same documents.")  # fmt: skip
@click.option("--include-path", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="A folder of task files (YAML); only its tasks are known then.")  # fmt: skip
@click.option("--limit", type=int, help="Only the first N examples or documents: to try things out.")
@click.option("--num-fewshot", type=int, help="Solved examples before each question.  [default: as the task says]")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Requests computed together.")
@click.option("--rolling", type=click.Choice(("stateful", "windows")), default="stateful", show_default=True,
              help="Perplexities: carry the state through a whole text, or start afresh in every window.")  # fmt: skip
@click.option(
    "--window",
    type=int,
    default=2048,
    show_default=True,
    help="Tokens in a window of --rolling windows and of --perplexity.",
)
@click.option("--bos/--no-bos", default=True, show_default=True, help="The end token before every context.")
@click.option("--device", help="Where to compute, such as cuda:1.  [default: an accelerator if there is one]")
@click.option("--dtype", help="Compute in float32, bfloat16, ...  [default: as saved]")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write all results to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def model(
    path: Path,
    tasks: str | None,
    perplexity: Path | None,
    choice: tuple[str, ...],
    extrapolate: Path | None,
    train_length: int | None,
    factors: str,
    seen: Path | None,
    rows: Path | None,
    against: Path | None,
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
    """Evaluate the model in PATH, a model folder, a run folder or a GGUF file. One of:

    \b
      --perplexity FILE           per source and domain, in windows and in one pass, as PALOMA does
      --extrapolate FILE          loss by place, at multiples of --train-length
      --choice TASK=FILE          lambada_openai, hellaswag, piqa, arc_easy, arc_challenge, winogrande
      --tasks NAMES               tasks of lm-eval, which loads their data from the Hugging Face hub (HF_HUB_OFFLINE=1
                                  and HF_DATASETS_OFFLINE=1 forbid it), or from your own files

    docs/evaluation.md has the formats, and what is computed.

    \b
      xlstm eval runs/demo --perplexity paloma.jsonl.zst --rows results/demo
      xlstm eval runs/demo --choice piqa=piqa.jsonl --choice arc_easy=arc.jsonl
      xlstm eval runs/demo --tasks lambada_openai,piqa --limit 100
      xlstm eval runs/demo --tasks my_task --include-path my_tasks --json
    """
    asked = {"--tasks": tasks, "--perplexity": perplexity, "--choice": choice, "--extrapolate": extrapolate}
    if sum(bool(value) for value in asked.values()) != 1:
        given = [name for name, value in asked.items() if value]
        raise ValueError(f"give one of {', '.join(asked)}; got {' and '.join(given) if given else 'none of them'}")
    if tasks is not None:
        answer = _tasks(
            path, tasks, include_path=include_path, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size,
            rolling=rolling, window=window, bos=bos, device=device, dtype=dtype, out=out,
        )  # fmt: skip
        show_json(answer) if as_json else _show_tasks(answer)
        return
    from openxlstm.cli import eval_text

    if extrapolate is not None and train_length is None:
        raise ValueError("--extrapolate needs --train-length, the context that the model was trained with")
    at = eval_text.setting(
        path, batch_size=batch_size, limit=limit, device=device, dtype=dtype, rows=rows, against=against
    )
    if perplexity is not None:
        answer, show = eval_text.run_perplexity(at, perplexity, window=window, seen=seen), eval_text.show_perplexity
    elif extrapolate is not None:
        assert train_length is not None, "asked for above"
        answer = eval_text.run_extrapolation(
            at, extrapolate, train_length=train_length, factors=eval_text.read_factors(factors)
        )
        show = eval_text.show_extrapolation
    else:
        answer, show = eval_text.run_choice(at, eval_text.read_choices(choice), bos=bos), eval_text.show_choice
    if out is not None:
        _write(out, answer)
    show_json(answer) if as_json else show(answer)


def _tasks(
    path: Path, tasks: str, *, include_path: Path | None, limit: int | None, num_fewshot: int | None, batch_size: int,
    rolling: str, window: int, bos: bool, device: str | None, dtype: str | None, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """What lm-eval finds; its tasks' configurations, too, in the file `out`."""
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
        _write(out, {**answer, "configs": found["configs"]})
    return json.loads(json.dumps(answer, default=str))


def _show_tasks(answer: dict[str, Any]) -> None:
    rows = [
        (task, metric.removesuffix(",none"), f"{value:.4f}", answer["n-samples"].get(task, {}).get("effective", ""))
        for task, metrics in answer["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    ]
    show_table(answer["model"], ("task", "metric", "value", "examples"), rows, numbers=(2, 3))


def _write(out: Path, answer: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(answer, indent=2, default=str) + "\n")


def _adapter() -> ModuleType:
    try:
        from openxlstm.tasks import lm_eval
    except ModuleNotFoundError as error:
        raise ValueError(f"xlstm eval needs lm-eval ({error}); pip install 'openxlstm[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its progress would stand between our lines
    return lm_eval
