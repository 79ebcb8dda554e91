"""The promises: names that programs import, verbs and options that scripts call, and an import that only imports.

Adding is a decision, made here; renaming or removing breaks somebody's program and needs a line in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

import openxlstm
from openxlstm.cli import VERBS, main

ROOT = Path(__file__).parents[1]

NAMES = {
    "__version__",
    "Tokenizer",
    "cells",
    "generate",
    "kernels",
    "load",
    "mLSTMState",
    "rnn",
    "sLSTMState",
    "save",
    "stream",
    "xLSTM",
    "xLSTMConfig",
    "xLSTMLarge",
    "xLSTMLargeConfig",
    "xLSTMStack",
    "xLSTMStackConfig",
}

OPTIONS = {
    "train": {"recipe", "overrides", "--out", "--allow", "--dry-run", "--print", "--json", "--help"},
    "estimate": {"recipe", "overrides", "--gpus", "--gpu", "--mfu", "--json", "--help"},
    "sweep": {"recipe", "overrides", "--grid", "--seeds", "--out", "--json", "--help"},
    "prepare": {
        "sources", "--out", "--tokenizer", "--split", "--text-key", "--delimiter", "--workers", "--slurm", "--ray",
        "--adopt", "--token-size", "--json", "--help",
    },
    "tokenizer": {"sources", "--vocab", "--out", "--text-key", "--json", "--help"},
    "inspect": {
        "folder", "--documents", "--windows", "--context", "--window", "--verify", "--json", "--help",
    },
    "generate": {
        "path", "--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty",
        "--stop", "--seed", "--json", "--help",
    },
    "eval": {"--help"},
    "eval list": {"--help"},
    "eval experiment": {"name", "--profile", "--models", "--results", "--data", "--jobs", "--json", "--help"},
    "eval report": {"files", "--write", "--readme", "--help"},
    "eval model": {
        "path", "--tasks", "--perplexity", "--choice", "--extrapolate", "--train-length", "--factors", "--seen",
        "--rows", "--against", "--include-path", "--limit", "--num-fewshot", "--batch-size", "--rolling", "--window",
        "--bos", "--device", "--dtype", "--out", "--json", "--help",
    },
    "export": {"run", "target", "--to", "--ema", "--step", "--json", "--help"},
    "ckpt": {"--help"},
    "ckpt info": {"path", "--json", "--help"},
    "ckpt diff": {"first", "second", "--part", "--most", "--json", "--help"},
    "ckpt consolidate": {"path", "file", "--part", "--json", "--help"},
    "convert": {
        "source", "target", "--to", "--quant", "--check", "--config", "--shard-size", "--slstm-layout", "--json",
        "--help",
    },
    "bench": {"suites", "--runs", "--threads", "--write", "--json", "--help"},
    "info": {"what", "--json", "--help"},
}  # fmt: skip

OPTIONAL = ("matplotlib", "transformers", "triton", "datatrove", "lm_eval", "starlette", "uvicorn", "xlstm", "gguf")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python that has imported nothing."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_exported_names_are_these() -> None:
    assert set(openxlstm.__all__) == NAMES
    for name in NAMES:
        assert getattr(openxlstm, name) is not None
    assert set(dir(openxlstm)) >= NAMES
    with pytest.raises(AttributeError, match="xLSTMM"):
        openxlstm.xLSTMM  # noqa: B018


def test_generate_and_stream_take_the_same_arguments() -> None:
    whole, pieces = (inspect.signature(f).parameters for f in (openxlstm.generate, openxlstm.stream))
    assert list(whole) == list(pieces)
    assert [parameter.default for parameter in whole.values()] == [parameter.default for parameter in pieces.values()]


def test_importing_is_quiet_and_needs_no_optional_package() -> None:
    done = fresh(
        "import socket, sys, torch, json\n"
        "def refuse(*_): raise RuntimeError('importing opened a socket')\n"
        "socket.socket.connect = refuse\n"
        "before = set(sys.modules)\n"
        "import openxlstm\n"
        "[getattr(openxlstm, name) for name in openxlstm.__all__]\n"
        "sys.stderr.write(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not set(OPTIONAL) & set(json.loads(done.stderr)), "an optional package was imported"


def test_the_command_line_answers_without_torch() -> None:
    for args in (["--help"], ["--version"]):
        done = fresh(
            "import sys; from openxlstm.cli import main; "
            f"main({args!r}, standalone_mode=False); sys.exit('torch' in sys.modules)"
        )
        assert done.returncode == 0, done.stderr or "torch was imported"
        assert "xlstm" in done.stdout


def test_the_verbs_are_these() -> None:
    assert set(VERBS) == {verb.split()[0] for verb in OPTIONS}
    groups = {verb: main.get_command(click.Context(main), verb) for verb in VERBS}
    inner = {
        f"{verb} {name}" for verb, group in groups.items() if isinstance(group, click.Group) for name in group.commands
    }
    assert inner == {verb for verb in OPTIONS if " " in verb}


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_options_of_a_verb_are_these_and_each_is_explained(verb: str) -> None:
    command: click.Command | None = main
    for word in verb.split():
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    shown = set()
    for parameter in [*command.params, command.get_help_option(click.Context(command, help_option_names=["--help"]))]:
        assert parameter is not None
        if isinstance(parameter, click.Option):
            shown.add(max(parameter.opts, key=len))
            assert parameter.help, f"{verb} {parameter.opts} needs a help text"
        else:
            shown.add(parameter.name)
    assert shown == OPTIONS[verb]
    assert len(command.help or "") > 80, f"xlstm {verb} --help should be worth reading"
