"""A run, as a recipe says it: the dataclasses of `recipe.py`, read strictly from TOML.

    extends = "base.toml"                 # one parent; tables merge, everything else is replaced
    [model]  architecture = "xlstm" ...   # or preset = "xlstm-125m"; every other key is one of the model's config
    [data]   [train]   [loss]   [optim]   [evaluate]   [checkpoint]   [guard]   [log]

`load` reads a file and the command line's overrides; `resolve` turns units into integers ("2B" tokens, "20x" tokens
per parameter, "10%" of the steps) and the model table into all of its fields. What comes out has no units left and is
stored beside the results, so that a run can be repeated from its folder alone.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Any

from openxlstm.models.accounting import count_parameters
from openxlstm.models.presets import PRESETS
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig
from openxlstm.train import strict
from openxlstm.train.recipe import ARCHITECTURES, COMPARED, Recipe, TrainRecipe, architecture, plain

EXCLUSIVE = (
    ("train.steps", "train.tokens"),
    ("model.architecture", "model.preset"),
    ("data.corpus", "data.sources"),
)
FILES = {"data.corpus": "stdlib", "data.tokenizer": "bytes"}  # keys that name a file, and the one name that does not
_FOLDER = Path(str(resources.files("openxlstm") / "recipes"))
FROZEN = ("model", "data", "optim", "loss.z_loss", "train.seed", "train.batch")  # what a run may not change half-way
FREE = ("data.valid",)  # below one of these, and yet nothing that is learned from


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
        base = Path.cwd() if parent.parent == _FOLDER else parent.parent  # shipped recipes name data of the user's
        table.layer(_absolute(values, base), parent.name)
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
    data, train, schedule = recipe.data, recipe.train, recipe.optim.schedule
    if train.steps is None:
        if train.tokens is None:
            raise ValueError(f'{table.name}: train needs steps = 1_000, or tokens = "2B", or tokens = "20x"')
        tokens = _tokens(train.tokens, recipe.model_config(), table.where("train.tokens"))
        steps = _steps(train, ceil(Fraction(tokens, recipe.data.context)))
    else:
        steps = train.steps
    schedule = replace(
        schedule,
        warmup=_share(schedule.warmup, steps, "optim.schedule.warmup", table),
        cooldown=_share(schedule.cooldown, steps, "optim.schedule.cooldown", table),
    )
    recipe = replace(
        recipe,
        data=replace(data, corpus="stdlib") if data.corpus is None and data.sources is None else data,
        train=replace(train, steps=steps, tokens=None),
        optim=replace(recipe.optim, schedule=schedule),
    )
    try:
        recipe.schedule()
    except ValueError as error:
        raise ValueError(f"{table.where('optim.schedule')}: optim.schedule: {error}") from None
    return recipe


def completed(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A recipe as an earlier version stored it, with what has been added since at its default.

    Raises:
        ValueError: it was written by a version whose recipes this one cannot read; the message begins with `origin`.
    """
    said = _without_none(values)
    table = strict.Table(origin)
    table.layer(said, origin)
    return strict.read(Recipe, said, table).to_dict()


def changed_frozen(
    before: Mapping[str, Any], after: Mapping[str, Any], allowed: Collection[str] = ()
) -> dict[str, list[Any]]:
    """What differs and may not change half-way: dotted key to old and new value. `allowed` keys, or tables, may.

    Raises:
        ValueError: `allowed` holds a name that no recipe has.
    """
    known = {part for key in (*_flat(before), *_flat(after)) for part in _prefixes(key)}
    for name in allowed:
        strict.choice(name, known, "--allow")
    free = (*FREE, *allowed)
    below = lambda key, parts: any(part in _prefixes(key) for part in parts)
    return {key: pair for key, pair in changed(before, after).items() if below(key, FROZEN) and not below(key, free)}


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
    """A path in a recipe counts from the recipe's folder; one on the command line from where the user stands.

    So does one in a recipe that is shipped: its folder is that of the installation, and the data is the user's.
    """

    def absolute(said: str, name: str) -> str:
        return said if said == name else str((base / Path(said).expanduser()).resolve())

    data = values.get("data")
    if not isinstance(data, dict):
        return values
    for path, name in FILES.items():
        key = path.partition(".")[2]
        if isinstance(data.get(key), str):
            data[key] = absolute(data[key], name)
    for source in data["sources"] if isinstance(data.get("sources"), list) else ():
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = absolute(source["path"], FILES["data.corpus"])
    for name, said in data["valid"].items() if isinstance(data.get("valid"), dict) else ():
        if isinstance(said, str):
            data["valid"][name] = absolute(said, FILES["data.corpus"])
    return values


def _resolve_model(model: Mapping[str, Any], table: strict.Table, vocab_size: int) -> dict[str, Any]:
    said = {key: value for key, value in model.items() if key not in ("architecture", "preset")}
    who = table.where("model")
    if "preset" in model:
        name = strict.choice(model["preset"], PRESETS, f"{table.where('model.preset')}: model.preset")
        preset = PRESETS[name].config
        chosen = next(key for key, (config, _) in ARCHITECTURES.items() if isinstance(preset, config))
        said = {**preset.to_dict(), "vocab_size": vocab_size, **said}
    else:
        given = model.get("architecture", "xlstm")
        names = [*ARCHITECTURES, *COMPARED]
        chosen = strict.choice(given, names, f"{table.where('model.architecture')}: model.architecture")
        said = {"vocab_size": vocab_size, **said}
    try:
        config = architecture(chosen)[0].from_dict(said)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: model: {error}") from None
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"{table.where('model.vocab_size')}: model.vocab_size = {config.vocab_size} must hold the tokenizer's"
            f" {vocab_size} entries; leave it out to use just these"
        )
    return {"architecture": chosen, **plain(config.to_dict())}


def _tokens(said: int | str, config: xLSTMConfig | xLSTMLargeConfig, where: str) -> int:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?|x)", str(said).replace("_", ""))
    if number is None or not Fraction(number[1]):
        raise ValueError(f'{where}: train.tokens = {said!r} must be a number, such as 2_000_000, "300M", "2B" or "20x"')
    unit = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    return ceil(Fraction(number[1]) * (count_parameters(config) if number[2] == "x" else unit[number[2]]))


def _steps(train: TrainRecipe, rows: int) -> int:
    """The fewest steps that read `rows` rows."""
    for (begin, batch), (end, _) in zip(train.ramp, [*train.ramp[1:], (None, 0)], strict=True):
        steps = begin + ceil(Fraction(rows - train.rows(begin), batch))
        if end is None or steps <= end:
            break
    return steps


def _share(said: int | str, steps: int, path: str, table: strict.Table) -> int:
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", said) if isinstance(said, str) else None
    if isinstance(said, int) and said >= 0:
        return said
    if percent is None:
        raise ValueError(
            f'{table.where(path)}: {path} = {said!r} must be steps, such as 100, or a share, such as "10%"'
        )
    return ceil(Fraction(percent[1]) * steps / 100)


def _without_none(value: Any) -> Any:
    """What TOML would hold: JSON writes None where nothing was said."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _prefixes(key: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = strict.join(path, key)
        flat |= _flat(value, inner) if isinstance(value, Mapping) else {inner: value}
    return flat
