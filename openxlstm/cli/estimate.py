"""`xlstm estimate`: what a run will need, before money is spent."""

from __future__ import annotations

from typing import Any

import click

from openxlstm.cli.common import short, show_facts, show_json, show_table, size


@click.command(short_help="Say what a run will need: memory per GPU, time, epochs; nothing is trained.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[TABLE.KEY=VALUE]...")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Devices, a process on each.")
@click.option("--gpu", "kind", help="Their kind: a100, h100, h200, b200 or mi300x. Without it, no time is estimated.")
@click.option("--mfu", type=float, default=0.4, show_default=True, help="Share of the peak that training reaches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: bytes, seconds and counts as numbers.")
def estimate(recipe: str, overrides: tuple[str, ...], gpus: int, kind: str | None, mfu: float, as_json: bool) -> None:
    """Say what the run that RECIPE describes will need. Its data need not be on this machine; nothing is allocated.

    Parameters by part, FLOPs, tokens and epochs, memory of one process by purpose, time on so many GPUs, size of a
    checkpoint; and the first window of data that are here, with every start of a document marked.

    \b
      xlstm estimate stdlib-demo
      xlstm estimate xlstm-7b --gpus 64 --gpu h100
      xlstm estimate xlstm-7b train.parallel=fsdp2 train.micro_batch=2 --gpus 128 --gpu h200 --mfu 0.38 --json
    """
    from openxlstm.train import estimate as library
    from openxlstm.train.gpus import gpu

    resolved, tokenizer = library.read(recipe, overrides)
    device = None if kind is None else gpu(kind)
    found = library.estimate(resolved, gpus=gpus, gpu=device, mfu=mfu, tokenizer=tokenizer)
    show_json(found) if as_json else _show(recipe, found)


def _show(name: str, found: dict[str, Any]) -> None:
    model, work, split, memory = found["model"], found["work"], found["parallel"], found["memory"]
    show_facts(found["title"] or name, {
        "model": f"{model['label']}, {model['parameters']:,} parameters, "
                 f"{size(model['state_bytes'])} of state per sequence",
        "tokens": f"{short(work['tokens'])} in {work['steps']:,} steps; "
                  f"{work['tokens_per_parameter']:.1f} per parameter",
        "FLOPs": f"{short(work['training_flops_per_token'])} per token in training, {work['flops']:.2e} in all",
        "dealt": f"{split['kind']} on {split['gpus']}: {split['batch']} rows a step = {split['gpus']} x "
                 f"{split['accumulation']} x {split['rows']} rows per forward pass"
                 + (f", each copy of the parameters on {split['shard']}" if split["shard"] > 1 else ""),
        "time": _time(found["time"]),
        "checkpoint": f"{size(found['checkpoint']['bytes'])}, of which the last {found['checkpoint']['kept']} are kept",
    })  # fmt: skip
    parts = [(part, count, f"{100 * count / model['parameters']:.1f} %") for part, count in model["parts"].items()]
    show_table("Parameters by part", ("part", "parameters", "share"), [row for row in parts if row[1]], numbers=(1, 2))
    rows = [(name, size(memory[name])) for name in memory if name not in ("device", "fits", "total")]
    rows.append(("in all", size(memory["total"])))
    if memory["device"] is not None:
        verdict = (
            "it fits" if memory["fits"] else "it does not fit: a smaller train.micro_batch, fsdp2, or recomputation"
        )
        rows.append((f"the GPU has ({verdict})", size(memory["device"])))
    show_table("Memory of one process", ("for", "bytes"), rows, numbers=(1,))
    show_table(
        "Data", ("source", "share", "tokens", "epochs"), [_source(row) for row in found["data"]], numbers=(1, 2, 3)
    )
    for row in found["data"]:
        if "first_window" in row:
            show_facts(f"The first window of {row['path']}", {"": row["first_window"]})


def _time(time: dict[str, Any] | None) -> str:
    if time is None:
        return "not estimated: name the device with --gpu"
    days = time["seconds"] / 86_400
    length = f"{days:.1f} days" if days >= 2 else f"{time['seconds'] / 3600:.1f} hours"
    return (
        f"{length}, {time['gpu_hours']:,.0f} GPU hours, {short(time['tokens_per_second'])} tokens/s "
        f"at {100 * time['mfu']:g} % of the peak of {time['gpu']}"
    )


def _source(row: dict[str, Any]) -> tuple[str, ...]:
    share = f"{100 * row['share']:.1f} %"
    if "tokens" in row:
        return row["path"], share, f"{row['tokens']:,}", f"{row['epochs']:.2f}"
    return row["path"], share, "known when prepared" if row["here"] else "not on this machine", ""
