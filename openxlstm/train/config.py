"""A run, as a recipe says it: frozen dataclasses read strictly from TOML.

    extends = "base.toml"                 # one parent; tables merge, everything else is replaced
    [model]  architecture = "xlstm" ...   # or preset = "xlstm-125m"; every other key is one of the model's config
    [data]   [train]   [optim]   [evaluate]   [checkpoint]

`load` reads a file and the command line's overrides; `resolve` turns units into integers ("2B" tokens, "20x" tokens
per parameter, "10%" of the steps) and the model table into all of its fields. What comes out has no units left and is
stored beside the results, so that a run can be repeated from its folder alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from importlib import resources
from math import ceil, inf, isqrt
from pathlib import Path
from typing import Any, Literal

from openxlstm.models.accounting import count_parameters
from openxlstm.models.presets import PRESETS
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.train import strict
from openxlstm.train.schedules import Kind, Schedule

ARCHITECTURES: dict[str, tuple[Any, Any]] = {  # name: (config, model)
    "xlstm": (xLSTMConfig, xLSTM),
    "xlstm_large": (xLSTMLargeConfig, xLSTMLarge),
}
EXCLUSIVE = (("train.steps", "train.tokens"), ("model.architecture", "model.preset"))
FILES = {"data.corpus": "stdlib", "data.tokenizer": "bytes"}  # keys that name a file, and the one name that does not
MOST = 2**31 - 1  # of anything that is counted in rows or tokens of one batch: what index arithmetic is safe for
_FOLDER = Path(str(resources.files("openxlstm") / "recipes"))
FROZEN = ("model", "data", "optim", "train.seed", "train.batch")  # what a run may not change half-way


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """What is read: documents, the tokenizer, and how many tokens one row holds."""

    corpus: str = "stdlib"  # the source of the Python library on this machine, or a folder of text files
    tokenizer: str = "bytes"  # or a tokenizer.json
    context: int = 256

    def __post_init__(self) -> None:
        _within("context", self.context, 1, MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """How long, in which portions, with which arithmetic."""

    batch: int  # rows per optimiser step
    steps: int | None = None  # this,
    tokens: int | str | None = None  # or this: 2_000_000, "2B", or "20x" the parameters
    micro_batch: int | None = None  # rows per forward pass; None is `batch`: no accumulation
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    compile: bool = False
    checkpoint_every: int = 0  # recompute every n-th block in the backward pass instead of keeping it; 0 keeps all
    max_minutes: float | None = None  # of training; the run then cools down early (see budget.py)

    def __post_init__(self) -> None:
        _within("batch", self.batch, 1, MOST)
        _within("checkpoint_every", self.checkpoint_every, 0)
        _within("seed", self.seed, 0, 2**63 - 1)
        if self.steps is not None:
            _within("steps", self.steps, 1)
        if self.max_minutes is not None and not 0 < self.max_minutes < inf:
            raise ValueError(f"max_minutes={self.max_minutes} must be above 0 and finite; leave it out for no limit")
        rows = self.batch if self.micro_batch is None else self.micro_batch
        if rows < 1 or self.batch % rows:
            small = [size for size in range(1, isqrt(self.batch) + 1) if self.batch % size == 0]
            near = min([*small, *(self.batch // size for size in small)], key=lambda size: abs(size - rows))
            raise ValueError(f"micro_batch={rows} must divide batch={self.batch}; nearest is {near}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRecipe:
    """The course of the learning rate (schedules.py). Steps are numbers, or "10%" of the run."""

    kind: Kind = "cosine"
    warmup: int | str = 0
    cooldown: int | str = 0
    floor: float = 0.1
    span: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor={self.floor} must be above 0 and at most 1; 0.1 ends at a tenth of the peak")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimRecipe:
    """AdamW, and the clip of the global gradient norm; `clip = inf` never clips."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not 0 < value < inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be above 0; inf never clips")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be at least 0 and below 1; (0.9, 0.95) is usual")
        if not 0 <= self.weight_decay < inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; 0 turns it off")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRecipe:
    """When and on how much the model is measured. The test split is read once, at the very end."""

    every: int = 100  # steps between validations
    windows: int = 64  # of the validation split, evenly spaced, the same ones every time
    batch: int = 16  # rows per forward pass
    yardsticks: bool = True  # fit byte n-grams and compressors on the same bytes for the report

    def __post_init__(self) -> None:
        _within("every", self.every, 1)
        _within("windows", self.windows, 1)
        _within("batch", self.batch, 1, MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecipe:
    """When the run is saved, besides at its end and on Ctrl-C, and how many saves are kept."""

    every: int = 200
    keep_last: int = 2

    def __post_init__(self) -> None:
        _within("every", self.every, 1)
        _within("keep_last", self.keep_last, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run. After `resolve` every unit is an integer and `model` holds all fields of one architecture."""

    title: str = ""
    model: Mapping[str, Any]
    data: DataRecipe
    train: TrainRecipe
    optim: OptimRecipe
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON and TOML hold them."""
        return _plain(asdict(self))

    def model_config(self) -> xLSTMConfig | xLSTMLargeConfig:
        """The model's config. Only for a resolved recipe."""
        config, _ = ARCHITECTURES[self.model["architecture"]]
        return config.from_dict({key: value for key, value in self.model.items() if key != "architecture"})

    def schedule(self) -> Schedule:
        """The course of the learning rate. Only for a resolved recipe."""
        said, steps = self.optim.schedule, self.train.steps
        assert steps is not None, "resolve(recipe) first"
        assert isinstance(said.warmup, int), "resolve(recipe) first"
        assert isinstance(said.cooldown, int), "resolve(recipe) first"
        return Schedule(
            kind=said.kind, end=steps, warmup=said.warmup, cooldown=said.cooldown, floor=said.floor, span=said.span
        )


def find(name: str) -> Path:
    """The recipe file that `name` means: a path, or the name of a recipe that is shipped with the package.

    Raises:
        ValueError: neither; the message lists the shipped ones.
    """
    if (file := Path(name)).is_file():
        return file
    if (file := _FOLDER / f"{name.removesuffix('.toml')}.toml").is_file():
        return file
    if name and Path(name).is_dir():
        raise ValueError(f"{name} is a folder, not a recipe; to go on with a run, give the recipe it began with")
    raise ValueError(f"{name!r}: there is no such recipe file; shipped with openxlstm are {', '.join(shipped())}")


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def load(file: Path, overrides: Iterable[str] = ()) -> tuple[Recipe, strict.Table]:
    """Read a recipe, its parents, and overrides such as `optim.lr=3e-4`.

    Returns the recipe and the table it was read from, which `resolve` asks who said what.

    Raises:
        ValueError: anything the reader finds wrong, with file and path.
    """
    table = strict.Table(file.name, EXCLUSIVE)
    for parent in _parents(file):
        values = strict.read_toml(parent)
        values.pop("extends", None)
        table.layer(_absolute(values, parent.parent), parent.name)
    table.layer(_absolute(strict.read_overrides(overrides), Path.cwd()), strict.COMMAND_LINE)
    return strict.read(Recipe, table.values, table), table


def resolve(recipe: Recipe, table: strict.Table, vocab_size: int) -> Recipe:
    """Units become integers and the model table becomes all of its fields.

    Args:
        vocab_size: of the tokenizer; the model's, unless the recipe gives a larger one.

    Raises:
        ValueError: a unit that cannot be read, a model that cannot be built, a schedule that does not fit.
    """
    model = _resolve_model(recipe.model, table, vocab_size)
    recipe = replace(recipe, model=model)
    train, schedule = recipe.train, recipe.optim.schedule
    if train.steps is None:
        if train.tokens is None:
            raise ValueError(f'{table.name}: train needs steps = 1_000, or tokens = "2B", or tokens = "20x"')
        tokens = _tokens(train.tokens, recipe.model_config(), table.where("train.tokens"))
        steps = ceil(Fraction(tokens, train.batch * recipe.data.context))
    else:
        steps = train.steps
    micro_batch = train.batch if train.micro_batch is None else train.micro_batch
    schedule = replace(
        schedule,
        warmup=_share(schedule.warmup, steps, "optim.schedule.warmup", table),
        cooldown=_share(schedule.cooldown, steps, "optim.schedule.cooldown", table),
    )
    recipe = replace(
        recipe,
        train=replace(train, steps=steps, tokens=None, micro_batch=micro_batch),
        optim=replace(recipe.optim, schedule=schedule),
    )
    try:
        recipe.schedule()
    except ValueError as error:
        raise ValueError(f"{table.where('optim.schedule')}: optim.schedule: {error}") from None
    return recipe


def changed_frozen(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Sentences about what a run may not change half-way, one per key that differs."""
    old, new = _flat(before), _flat(after)
    keys = [key for key in sorted(old.keys() | new.keys()) if any(f"{key}.".startswith(f"{part}.") for part in FROZEN)]
    return [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Every dotted key that differs, with its old and its new value."""
    old, new = _flat(before), _flat(after)
    return {
        key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def _parents(file: Path) -> list[Path]:
    """`file` after its parents, the oldest first."""
    chain: list[Path] = []
    while True:
        if file.resolve() in (seen.resolve() for seen in chain):
            raise ValueError(
                f"{chain[0]}: extends goes in a circle: {' -> '.join(part.name for part in [*chain, file])}"
            )
        chain.append(file)
        parent = strict.read_toml(file).get("extends")
        if parent is None:
            return chain[::-1]
        if not isinstance(parent, str):
            raise ValueError(f"{file.name}: extends = {parent!r} must be the path of one recipe")
        beside = file.parent / parent
        file = beside if beside.is_file() else find(parent)


def _absolute(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """A path in a recipe counts from the recipe's folder; one on the command line from where the user stands."""
    data = values.get("data")
    if isinstance(data, dict):
        for path, name in FILES.items():
            key = path.partition(".")[2]
            if isinstance(data.get(key), str) and data[key] != name:
                data[key] = str((base / Path(data[key]).expanduser()).resolve())
    return values


def _resolve_model(model: Mapping[str, Any], table: strict.Table, vocab_size: int) -> dict[str, Any]:
    said = {key: value for key, value in model.items() if key not in ("architecture", "preset")}
    who = table.where("model")
    if "preset" in model:
        name = strict.choice(model["preset"], PRESETS, f"{table.where('model.preset')}: model.preset")
        preset = PRESETS[name].config
        architecture = next(key for key, (config, _) in ARCHITECTURES.items() if isinstance(preset, config))
        said = {**preset.to_dict(), "vocab_size": vocab_size, **said}
    else:
        given = model.get("architecture", "xlstm")
        architecture = strict.choice(given, ARCHITECTURES, f"{table.where('model.architecture')}: model.architecture")
        said = {"vocab_size": vocab_size, **said}
    try:
        config = ARCHITECTURES[architecture][0].from_dict(said)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: model: {error}") from None
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"{table.where('model.vocab_size')}: model.vocab_size = {config.vocab_size} must hold the tokenizer's"
            f" {vocab_size} entries; leave it out to use just these"
        )
    return {"architecture": architecture, **_plain(config.to_dict())}


def _tokens(said: int | str, config: xLSTMConfig | xLSTMLargeConfig, where: str) -> int:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?|x)", str(said).replace("_", ""))
    if number is None or not Fraction(number[1]):
        raise ValueError(f'{where}: train.tokens = {said!r} must be a number, such as 2_000_000, "300M", "2B" or "20x"')
    unit = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    return ceil(Fraction(number[1]) * (count_parameters(config) if number[2] == "x" else unit[number[2]]))


def _share(said: int | str, steps: int, path: str, table: strict.Table) -> int:
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", said) if isinstance(said, str) else None
    if isinstance(said, int) and said >= 0:
        return said
    if percent is None:
        raise ValueError(
            f'{table.where(path)}: {path} = {said!r} must be steps, such as 100, or a share, such as "10%"'
        )
    return ceil(Fraction(percent[1]) * steps / 100)


def _within(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} must be at most {most}")


def _plain(value: Any) -> Any:
    """Tuples become lists, as JSON has them, so that what is stored equals what is read back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = strict.join(path, key)
        flat |= _flat(value, inner) if isinstance(value, Mapping) else {inner: value}
    return flat
