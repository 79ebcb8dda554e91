"""The reader: whatever is wrong with a recipe is a sentence with file, path and nearest fix."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from openxlstm.train import strict


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    lr: float
    kind: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    steps: int
    tokens: int | str | None = None
    fast: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    optim: Inner


def read(*layers: str) -> Outer:
    table = strict.Table("a.toml", exclusive=(("steps", "tokens"),))
    for number, text in enumerate(layers):
        table.layer(tomllib.loads(text), f"{'abc'[number]}.toml")
    return strict.read(Outer, table.values, table)


GOOD = "steps = 3\n[optim]\nlr = 1\n"


def test_what_is_right_is_read_as_its_type() -> None:
    value = read(GOOD)
    assert value == Outer(steps=3, optim=Inner(lr=1.0))
    assert type(value.optim.lr) is float


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps = 3\n[optim]\nlrr = 1", "a.toml: optim has no field 'lrr'; did you mean 'lr'?"),
        ("stepz = 3\n[optim]\nlr = 1", "a.toml: a recipe has no field 'stepz'; did you mean 'steps'?"),
        ("q = 1\n" + GOOD, "a.toml: a recipe has no field 'q'; it has steps, tokens, fast, model, optim"),
        ("[optim]\nlr = 1", "a.toml: steps is missing"),
        ("steps = 3\n[optim]\nkind = 'cosine'", "a.toml: optim.lr is missing"),
        ("steps = '3'\n[optim]\nlr = 1", "a.toml: steps = '3' must be a whole number"),
        ("steps = true\n[optim]\nlr = 1", "a.toml: steps = True must be a whole number"),
        ("steps = 3.0\n[optim]\nlr = 1", "a.toml: steps = 3.0 must be a whole number"),
        ("steps = 3\n[optim]\nlr = 'fast'", "a.toml: optim.lr = 'fast' must be a number"),
        ("steps = 3\noptim = 3", "a.toml: optim = 3 must be a table"),
        ("steps = 3\nmodel = 3\n[optim]\nlr = 1", "a.toml: model = 3 must be a table"),
        ("steps = 3\nfast = 1\n[optim]\nlr = 1", "a.toml: fast = 1 must be true or false"),
        (GOOD + "betas = [1]", "a.toml: optim.betas = [1] must be a list of 2 numbers"),
        (
            GOOD + "kind = 'cosinus'",
            "a.toml: optim.kind = 'cosinus' must be one of 'cosine', 'constant'; did you mean 'cosine'?",
        ),
        ("steps = 3\n[optim]\nlr = -1", "a.toml: optim.lr=-1.0 must be above 0"),
        ("tokens = 4\n" + GOOD, "a.toml: steps and tokens say one thing in two ways; keep one of them"),
    ],
)
def test_what_is_wrong_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(text)
    assert str(caught.value) == sentence


def test_the_sentence_names_the_layer_that_said_it() -> None:
    with pytest.raises(ValueError, match=r"^b.toml: optim.lr = 'x' must be a number$"):
        read(GOOD, "optim.lr = 'x'")
    with pytest.raises(ValueError, match=r"^b.toml: optim is a table; give its fields, as in optim.lr$"):
        read(GOOD, "optim = 3")
    with pytest.raises(ValueError, match=r"^b.toml: steps is a value, so there is no steps.x$"):
        read(GOOD, "steps.x = 3")


def test_tables_merge_and_lists_are_replaced() -> None:
    value = read(GOOD + "betas = [0.1, 0.2]", "optim.kind = 'constant'\noptim.betas = [0.3, 0.4]")
    assert value == Outer(steps=3, optim=Inner(lr=1.0, kind="constant", betas=(0.3, 0.4)))


def test_a_later_layer_may_say_it_the_other_way() -> None:
    table = strict.Table("a.toml", exclusive=(("steps", "tokens"),))
    table.layer({"steps": 3, "optim": {"lr": 1}}, "a.toml")
    table.layer({"tokens": "2B"}, "b.toml")
    assert table.values == {"optim": {"lr": 1}, "tokens": "2B"}


def test_overrides_are_toml_or_words() -> None:
    texts = [
        "optim.lr=3e-4",
        "optim.betas=[0.9, 0.99]",
        "data.corpus=/some/where",
        "train.tokens=2B",
        "a.b=true",
        "t='x=y'",
    ]
    assert strict.read_overrides(texts) == {
        "optim": {"lr": 3e-4, "betas": [0.9, 0.99]},
        "data": {"corpus": "/some/where"},
        "train": {"tokens": "2B"},
        "a": {"b": True},
        "t": "x=y",
    }


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["optim.lr"], "command line: 'optim.lr' is no override; write table.key=value, as in optim.lr=3e-4"),
        (["optim..lr=1"], "command line: 'optim..lr=1' is no override; write table.key=value, as in optim.lr=3e-4"),
        (["a=1", "a=2"], "command line: a is given twice; keep one of them"),
        (["a=1\nb=2"], "command line: 'a=1\\nb=2': write one key and one value"),
        (["a=[1"], "command line: 'a=[1': the value is not TOML"),
        (["a=1", "a.b=2"], "command line: a is a value, so there is no a.b"),
    ],
)
def test_overrides_that_are_none(texts: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        strict.read_overrides(texts)
    assert str(caught.value) == sentence


def test_what_is_written_reads_back() -> None:
    values = {
        "title": 'a "b"\\ \n\r\t\x00\x1b\x7f é 😀',
        "n": 1,
        "x": 1e-5,
        "big": 1e22,
        "t": {"on": True, "list": [1, 2.5, "z"], "u": {"v": 0.1}},
        "e": {},
    }
    written = tomllib.loads(strict.write_toml(values | {"left_out": None}))
    assert written == {key: value for key, value in values.items() if value != {}}


def test_files_that_are_no_recipes(tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        strict.read_toml(tmp_path / "none.toml")
    (tmp_path / "torn.toml").write_text("[a\n")
    with pytest.raises(ValueError, match=r"torn.toml: not a TOML file: "):
        strict.read_toml(tmp_path / "torn.toml")
