"""The habits that a test can keep. Each list of exceptions gives its reason; an entry that is not needed fails."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "openxlstm"
LONGEST = 450  # lines: a guideline with a guard, so that a longer file has a reason
LONGER: dict[str, str] = {}
PRINTS = ("cli/", "bench/")  # folders whose job is to print
KEYWORDS = {  # files with public functions that take **kwargs
    "hf/cache.py": "the protocol of transformers' cache layers",
    "hf/generation.py": "the protocol of transformers' generate",
    "hf/heads.py": "transformers passes keywords through forward, to the backbone and the loss",
    "hf/modeling.py": "transformers passes keywords through forward, to the backbone and the loss",
    "bench/gpu/stage.py": "the names given to emit are those of a line of JSON",
    "cells/state.py": "State.to passes on whatever Tensor.to takes",
    "models/checks.py": "the names given to check_positive are the words of its errors",
}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parsed(file: str) -> ast.Module:
    """The syntax tree of a file of the package."""
    return ast.parse((PACKAGE / file).read_text())


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef, bool]]:
    """(name, definition, whether a method) of everything a reader may use: no leading underscore on the way to it."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, False
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, Function) and (not inner.name.startswith("_") or inner.name == "__init__"):
                    yield f"{node.name}.{inner.name}", inner, True


def decorators(node: Function | ast.ClassDef) -> set[str]:
    """The last names of the decorators: `torch.no_grad()` is no_grad."""
    return {ast.unparse(item).split("(")[0].split(".")[-1] for item in node.decorator_list}


def is_a_promise(node: Function | ast.ClassDef) -> bool:
    """Whether the body is `...`: an overload, or a member of a Protocol."""
    return len(node.body) == 1 and isinstance(node.body[0], ast.Expr) and ast.unparse(node.body[0]) == "..."


def test_a_file_stays_short_or_says_why() -> None:
    long = {file for file in FILES if len((PACKAGE / file).read_text().splitlines()) > LONGEST}
    assert long <= set(LONGER), f"split {sorted(long - set(LONGER))}, or give the reason in LONGER"
    assert set(LONGER) <= long, f"{sorted(set(LONGER) - long)} became short again; take them out of LONGER"


@pytest.mark.parametrize("file", FILES)
def test_a_module_says_what_it_is(file: str) -> None:
    if parsed(file).body:
        assert ast.get_docstring(parsed(file)), f"{file} needs a docstring: what it holds, and from which source"


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(PRINTS)])
def test_the_library_does_not_print(file: str) -> None:
    lines = [
        node.lineno
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "breakpoint")
    ]
    assert not lines, f"{file} prints at lines {lines}; return it, raise it, or log it"


@pytest.mark.parametrize("file", FILES)
def test_public_code_is_documented_and_typed(file: str) -> None:
    missing = []
    for name, node, method in public(parsed(file)):
        # forward and a constructor are explained by their class, a setter by its getter, `...` by what implements it
        explained = name.endswith((".forward", ".__init__")) or "setter" in decorators(node) or is_a_promise(node)
        if not explained and not ast.get_docstring(node):
            missing.append(f"{file}:{node.lineno} {name} has no docstring")
        if isinstance(node, Function) and "jit" not in decorators(node):  # what Triton compiles has no types
            first = int(method and "staticmethod" not in decorators(node))
            arguments = [*node.args.posonlyargs, *node.args.args][first:] + node.args.kwonlyargs
            bare = [argument.arg for argument in arguments if argument.annotation is None]
            if bare:
                missing.append(f"{file}:{node.lineno} {name} has untyped {', '.join(bare)}")
            if node.returns is None and node.name != "__init__":
                missing.append(f"{file}:{node.lineno} {name} does not say what it returns")
    assert not missing, "\n".join(missing)


def test_no_misspelt_option_is_swallowed() -> None:
    found = {
        file
        for file in FILES
        for _, node, _ in public(parsed(file))
        if isinstance(node, Function) and node.args.kwarg is not None
    }
    assert found <= set(KEYWORDS), f"{sorted(found - set(KEYWORDS))}: public functions name their options, no **kwargs"
    assert set(KEYWORDS) <= found, f"{sorted(set(KEYWORDS) - found)}: no **kwargs any more; take it out of KEYWORDS"


@pytest.mark.parametrize("file", FILES)
def test_no_error_is_passed_over(file: str) -> None:
    bare = [
        node.lineno
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(line, ast.Pass) for line in node.body))
    ]
    assert not bare, f"{file} passes over errors at lines {bare}; name the error and answer it, or contextlib.suppress"


def narrows(test: ast.expr) -> bool:
    """Whether the condition only tells the type checker something: `x is not None`, `isinstance(x, T)`."""
    return ast.unparse(test).endswith("is not None") or ast.unparse(test).startswith(("isinstance(", "is_dataclass("))


@pytest.mark.parametrize("file", FILES)
def test_an_assert_has_a_sentence(file: str) -> None:
    mute = [
        node.lineno
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Assert) and node.msg is None and not narrows(node.test)
    ]
    assert not mute, f"{file} asserts without a sentence at lines {mute}"


def test_text_ends_where_it_should() -> None:
    bad = [
        file for file in FILES if (text := (PACKAGE / file).read_text()) and (not text.endswith("\n") or "\t" in text)
    ]
    assert not bad, f"tabs, or no line break at the end: {bad}"
