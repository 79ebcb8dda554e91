"""Where the tasks of a preparation run when one machine is too slow: a file for Slurm, read strictly.

time = "04:00:00"
partition = "cpu"
mem_per_cpu_gb = 4
env_command = "source /shared/venv/bin/activate"
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """What datatrove's SlurmPipelineExecutor asks sbatch for.

    time, partition   as sbatch knows them
    cpus_per_task     one task is one process; more than 1 only buys its memory
    workers           tasks that run at once; -1: as many as the cluster gives
    tasks             how many in all; by default one per 64 MB of files, at most 128
    tasks_per_job     tasks that one element of the job array runs, one after the other
    max_array_size    the longest job array this cluster allows
    env_command       a shell line that makes the Python with openxlstm[data] the first one
    sbatch            more of sbatch's options, without their dashes: { account = "lab" }
    """

    time: str
    partition: str
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    workers: int = -1
    tasks: int | None = None
    tasks_per_job: int = 1
    max_array_size: int = 1001
    qos: str = ""
    env_command: str = ""
    sbatch: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Slurm:
        """From a TOML file.

        Raises:
            ValueError: an unknown key, a missing one, or a value of another type; with the file's name.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
        hints = typing.get_type_hints(cls)
        for key, value in table.items():
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                raise ValueError(
                    f"{path} has no field {key!r}; {f'did you mean {near[0]!r}?' if near else _known(hints)}"
                )
            if not _fits(value, hints[key]):
                raise ValueError(
                    f"{path}: {key} = {value!r} must be of type {hints[key]}".replace("<class ", "").replace("'>", "'")
                )
        for needed in ("time", "partition"):
            if needed not in table:
                raise ValueError(
                    f'{path} does not say {needed}, as {needed} = "{"04:00:00" if needed == "time" else "cpu"}"'
                )
        return cls(**table)

    def to_datatrove(self) -> dict[str, Any]:
        """The arguments of SlurmPipelineExecutor that come from here."""
        names = [each.name for each in fields(self) if each.name not in ("tasks", "env_command", "sbatch")]
        return {name: getattr(self, name) for name in names} | {
            "env_command": self.env_command or None,
            "sbatch_args": dict(self.sbatch),
        }


def _known(hints: dict[str, Any]) -> str:
    return f"its fields are {', '.join(hints)}"


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    return isinstance(value, hint) and not isinstance(value, bool)
