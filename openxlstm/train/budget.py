"""A limit in minutes, kept honestly.

The rate is a function of the step, and a clock is not. So the clock may decide one thing, once: at which step the
cool-down begins. The decision is written down before it is acted on, and a resumed run reads it instead of deciding
again; from then on the rate is a function of the step as before. A course without a cool-down cannot be shortened
without changing its shape; it is simply cut at the limit, and the run says so.
"""

import json
import os
from pathlib import Path

from openxlstm.train.checkpoints import sync
from openxlstm.train.log import read_json
from openxlstm.train.schedules import Schedule

FILE = "plan.json"
MARGIN = 1.05  # a machine that slows down a little during the cool-down still finishes it
SETTLE = 10  # steps before the pace is believed: the first ones allocate and warm caches


def shortened(schedule: Schedule, step: int, seconds_left: float, pace: float) -> Schedule | None:
    """The course that begins to cool down now, if that is the last moment to finish in time; else None.

    `pace` is seconds per step, measurements and saves included.
    """
    begun = step > schedule.end - schedule.cooldown
    if not schedule.cooldown or begun or step < max(SETTLE, schedule.warmup):
        return None
    shorter = schedule.cool_down_from(step)
    needed = (1 + MARGIN * shorter.cooldown) * pace  # the 1: seen only after another step, it would be too late
    return shorter if shorter.end < schedule.end and needed >= seconds_left else None


def write_plan(folder: Path, shorter: Schedule, steps: int, minutes: float) -> None:
    """Settle for good where the run cools down. `steps` and `minutes` are what the recipe asked for."""
    plan = {"steps": steps, "max_minutes": minutes, "cool_down_from": shorter.end - shorter.cooldown}
    scratch = folder / f"{FILE}.tmp"
    scratch.write_text(json.dumps(plan) + "\n", encoding="utf-8")
    sync(scratch)
    os.replace(scratch, folder / FILE)


def read_plan(folder: Path, schedule: Schedule, steps: int, minutes: float | None) -> Schedule:
    """The course as settled earlier in this run, or `schedule` if nothing was, or for another limit.

    Raises:
        ValueError: the plan is damaged.
    """
    file = folder / FILE
    if minutes is None or not file.exists():
        return schedule
    plan = read_json(file, "steps", "max_minutes", "cool_down_from")
    if (plan["steps"], plan["max_minutes"]) != (steps, minutes):
        return schedule
    begin = plan["cool_down_from"]
    if not isinstance(begin, int) or not 0 < begin <= steps:
        raise ValueError(f"{file}: cool_down_from = {begin!r} must be a step in 1..{steps}; restore it")
    return schedule.cool_down_from(begin)
