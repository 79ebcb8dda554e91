"""A TOML table into a frozen dataclass, or a sentence about why not.

Strict, because a typo is not a preference: an unknown key, a missing one, a wrong type and a value out of range are
errors that name the file and the dotted path. Files may extend one parent; overrides from the command line pass
through the same reader.
"""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
COMMAND_LINE = "command line"


@dataclass(slots=True)
class Table:
    """Nested TOML values, and for each leaf the file (or the command line) that said it.

    `exclusive` lists groups of paths that say one thing in several ways: one layer may use only one of each group,
    and a later layer's choice replaces the earlier layer's.
    """

    name: str  # the recipe as the user called it, for errors about what is missing
    exclusive: Sequence[tuple[str, ...]] = ()
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def where(self, path: str) -> str:
        """Who said `path`: a file name, or the command line. What stands in a list was said with the list."""
        path = path.partition("[")[0]
        inside = (origin for leaf, origin in self.origins.items() if leaf == path or leaf.startswith(f"{path}."))
        return next(inside, self.name)

    def layer(self, values: Mapping[str, Any], origin: str) -> None:
        """Lay one file or the command line over what is there: tables merge, everything else is replaced.

        Raises:
            ValueError: the layer says one thing in two ways, or turns a table into a value or back.
        """
        leaves = dict(_leaves(values))
        for group in self.exclusive:
            said = [path for path in group if path in leaves]
            if len(said) > 1:
                raise ValueError(f"{origin}: {' and '.join(said)} say one thing in two ways; keep one of them")
            for path in group if said else ():
                _remove(self.values, path)
                self.origins.pop(path, None)
        for path, value in leaves.items():
            _insert(self.values, path, value, origin)
            self.origins = {leaf: who for leaf, who in self.origins.items() if not leaf.startswith(f"{path}.")}
            self.origins[path] = origin


def read_toml(file: Path) -> dict[str, Any]:
    """The values of one TOML file.

    Raises:
        ValueError: the file is missing, is not text, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a TOML file: {error}") from None


def read_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`optim.lr=3e-4` and its like, as nested values. A value is TOML; a bare word is a string.

    Raises:
        ValueError: no `=`, an empty path, a value that is neither TOML nor a word, or one path given twice.
    """
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for text in texts:
        path, equals, word = text.partition("=")
        if not equals or not all(path.split(".")):
            raise ValueError(f"{COMMAND_LINE}: {text!r} is no override; write table.key=value, as in optim.lr=3e-4")
        if path in seen:
            raise ValueError(f"{COMMAND_LINE}: {path} is given twice; keep one of them")
        seen.add(path)
        value = _override_value(word, text)
        for leaf, item in _leaves({path: value}) if isinstance(value, Mapping) else ((path, value),):
            _insert(values, leaf, item, COMMAND_LINE)
    return values


def read(cls: type[T], values: Mapping[str, Any], table: Table, path: str = "") -> T:
    """Build `cls`, a dataclass, from `values`, which stand at `path` of `table`.

    Raises:
        ValueError: an unknown, missing, mistyped or impossible field; the message names file, path and nearest fix.
    """
    assert is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"{table.where(join(path, key))}: {path or 'a recipe'} has no {_unknown(key, hints)}")
    given = {key: _read_value(hints[key], value, table, join(path, key)) for key, value in values.items()}
    for item in fields(cls):
        if item.name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{table.where(path) if path else table.name}: {join(path, item.name)} is missing")
    try:
        return typing.cast(T, cls(**given))
    except ValueError as error:  # a range that the dataclass itself checks; its sentence begins with the field's name
        at = join(path, str(error).partition("=")[0])
        raise ValueError(f"{table.where(at)}: {join(path, str(error))}") from None


def write_toml(values: Mapping[str, Any], path: str = "") -> str:
    """TOML text that reads back to `values`; what is None is left out, since TOML has no word for it."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    head = [f"[{path}]"] if path and plain else []
    lines = [*head, *(f"{key} = {_toml_value(value)}" for key, value in plain.items())]
    parts = ["\n".join(lines)] if lines else []
    return "\n\n".join(parts + [write_toml(value, join(path, key)) for key, value in tables.items()])


def choice(value: Any, options: Iterable[str], where: str) -> str:
    """`value`, which must be one of `options`.

    Raises:
        ValueError: it is not; the message begins with `where` and names the nearest.
    """
    known = list(options)
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
    fix = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"
    raise ValueError(f"{where} = {value!r} is unknown; {fix}")


def join(path: str, key: str) -> str:
    """The dotted path of `key` inside `path`."""
    return f"{path}.{key}" if path else key


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"field {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}")


def _read_value(hint: Any, value: Any, table: Table, path: str) -> Any:
    """`value` as the type `hint`, which is what this project's recipes use: see the branches."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        plain = [option for option in arguments if option is not type(None)]
        fitting = [option for option in plain if _fits(option, value)]
        if not fitting and len(plain) > 1:
            raise ValueError(f"{table.where(path)}: {path} = {value!r} must be {_describe(hint)}")
        return _read_value((fitting or plain)[0], value, table, path)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, Mapping):
        return read(hint, value, table, path)
    inner = arguments[0] if arguments else None
    if origin is tuple and isinstance(inner, type) and is_dataclass(inner) and _is_list_of_tables(value):
        return tuple(read(inner, item, table, f"{path}[{index}]") for index, item in enumerate(value))
    if not _fits(hint, value):
        raise ValueError(f"{table.where(path)}: {path} = {value!r} must be {_describe(hint)}{_near(hint, value)}")
    if origin is tuple:
        options = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read_value(option, item, table, path) for option, item in zip(options, value, strict=True))
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments and type(value) in {type(option) for option in arguments}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        options = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(options) and all(map(_fits, options, value))
    if origin is Mapping and arguments[1] is str:
        return isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values())
    if hint in (int, float) and isinstance(value, bool):  # for Python a bool is an int; for a recipe it is not
        return False
    if hint is int:
        return isinstance(value, int) and abs(value) < 2**63  # what TOML promises, though Python reads more
    if hint is float:
        return isinstance(value, int | float)
    return not is_dataclass(hint) and isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in arguments if option is not type(None))
    if typing.get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return f"a list, and each of its items {_describe(arguments[0])}"
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(arguments)} numbers"
    if typing.get_origin(hint) is Mapping and arguments[1] is str:
        return "a table of texts"
    return names.get(hint, "a table")


def _near(hint: Any, value: Any) -> str:
    options = [option for option in typing.get_args(hint) if isinstance(option, str)]
    near = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, join(path, key))
        else:
            yield join(path, key), value


def _insert(values: dict[str, Any], path: str, value: Any, origin: str) -> None:
    *tables, key = path.split(".")
    for depth, name in enumerate(tables, start=1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"{origin}: {'.'.join(tables[:depth])} is a value, so there is no {path}")
    if isinstance(values.get(key), dict) and not isinstance(value, Mapping):
        raise ValueError(f"{origin}: {path} is a table; give its fields, as in {path}.{next(iter(values[key]), 'key')}")
    if isinstance(value, Mapping) and key in values:
        return  # an empty table adds nothing to what is there
    values[key] = value


def _remove(values: dict[str, Any], path: str) -> None:
    *tables, key = path.split(".")
    for name in tables:
        inner = values.get(name)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(key, None)


def _override_value(word: str, text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {word}")
        if len(read) == 1:  # not when a line break in the word begins another key
            return read["value"]
        raise ValueError(f"{COMMAND_LINE}: {text!r}: write one key and one value")
    except tomllib.TOMLDecodeError:
        if word and word[0] not in "[{\"'":
            return word
        raise ValueError(f"{COMMAND_LINE}: {text!r}: the value is not TOML") from None


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but DEL
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):  # in a list only: elsewhere it is a table of its own
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    assert isinstance(value, int | float), f"a recipe holds no {type(value).__name__}"
    return repr(value)
