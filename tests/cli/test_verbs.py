"""The command line: a thin shell around the library, that says what is wrong in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from openxlstm.checkpoint.store import load, save
from openxlstm.cli import main
from openxlstm.cli.generate import VISIBLE
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.infer.generate import generate
from openxlstm.kernels.cpu.library import native
from openxlstm.models.presets import PRESETS
from openxlstm.models.xlstm import xLSTM, xLSTMConfig


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run folder as `xlstm train` leaves it, as far as other verbs read it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "demo"
    save(xLSTM(xLSTMConfig(vocab_size=257, width=16, heads=2, pattern="mms")), folder / "model")
    Tokenizer.bytes().save(folder / "model" / "tokenizer.json")
    (folder / "resolved.json").write_text("{}")
    return folder


def xlstm(*arguments: object, text: str | None = None) -> Result:
    """Run a command as a terminal would, its output captured."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=text)


def refused(*arguments: object) -> str:
    """What a command says that cannot run; it must be a sentence, not a traceback."""
    done = xlstm(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return done.output.strip().splitlines()[-1]


def test_generate_writes_the_prompt_and_what_the_library_writes(run_folder) -> None:
    done = xlstm("generate", run_folder, "--prompt", "é = ", "--max-tokens", 30, "--temperature", 0.8, "--seed", 3)
    assert done.exit_code == 0, done.output
    wanted = generate(load(run_folder / "model"), Tokenizer.bytes(), "é = ", max_tokens=30, temperature=0.8, seed=3)
    assert done.stdout == f"é = {wanted}\n"
    assert xlstm("generate", run_folder / "model", "-p", "é = ", "-n", 30, "-t", 0.8, "--seed", 3).stdout == done.stdout


def test_generate_reads_the_prompt_from_standard_input(run_folder) -> None:
    options = ("--max-tokens", 5, "--seed", 1)
    piped = xlstm("generate", run_folder, "--prompt", "-", *options, text="two\nlines\n")
    assert piped.stdout == xlstm("generate", run_folder, "--prompt", "two\nlines\n", *options).stdout


def test_generate_tells_a_machine_everything_that_repeats_the_text(run_folder) -> None:
    for _ in range(50):  # every draw has a seed of its own, and some end before twenty tokens
        first = json.loads(xlstm("generate", run_folder, "-p", "a", "-n", 20, "--top-k", 40, "--json").stdout)
        assert first["finished"] in ("length", "end")
        if first["finished"] == "length":
            break
    assert first["tokens"] == 20
    assert first["prompt_tokens"] == 2
    assert first["finished"] == "length"
    again = json.loads(
        xlstm("generate", run_folder, "-p", "a", "-n", 20, "--top-k", 40, "--seed", first["seed"], "--json").stdout
    )
    assert again["text"] == first["text"]
    stop = first["text"][4:6]
    stopped = xlstm("generate", run_folder, "-p", "a", "-n", 20, "--top-k", 40, "--seed", first["seed"], "--stop", stop)
    assert stopped.stdout == f"a{first['text'].split(stop)[0]}\n"


def test_every_sampling_option_arrives(run_folder) -> None:
    plain = ("generate", run_folder, "-p", "a", "-n", 12, "--seed", 1)
    texts = {
        xlstm(*plain, *option).stdout
        for option in (
            (), ("--temperature", 0.1), ("--top-k", 2), ("--top-p", 0.05), ("--min-p", 0.9),
            ("--repetition-penalty", 50), ("--seed", 2), ("--max-tokens", 3), ("--temperature", 0),
        )
    }  # fmt: skip
    assert len(texts) == 9


def test_a_model_cannot_command_the_terminal() -> None:
    shown = "\x1b]0;owned\x07\x9b31m\x7f tab\tline\n é".translate(VISIBLE)
    assert shown == "␛]0;owned␇\ufffd31m␡ tab\tline\n é"


def test_ctrl_c_is_not_an_error_of_ours(run_folder, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openxlstm.infer.generate.pieces", interrupted)
    done = xlstm("generate", run_folder, "-p", "a")
    assert done.exit_code == 130
    assert done.output.strip().endswith("stopped")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generat"], "there is no verb 'generat'; did you mean 'generate'?"),
        (["fly"], "there is no verb 'fly'; the verbs are train, "),
        (["generate", "RUN", "-p", "a", "--top-q", "1"], "--top-q"),
        (["generate", "RUN", "-p", "a", "--top-p", "1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["generate", "RUN", "-p", ""], "prompt is empty; give the model something to continue"),
        (["generate", "RUN", "-p", "a", "-n", "0"], "max_tokens=0 must be at least 1"),
        (["generate", "RUN", "-p", "a", "-n", "many"], "'many' is not a valid integer"),
        (["generate", "RUN"], "--prompt"),
        (["generate", "RUM", "-p", "a"], "did you mean"),
        (["generate", "/", "-p", "a"], "neither a run folder nor a model folder"),
        (["info", "xlstm-7"], "there is no folder, recipe or preset 'xlstm-7'; did you mean xlstm-7b?"),
        (["info", "stdlib-dem"], "there is no folder, recipe or preset 'stdlib-dem'; did you mean stdlib-demo?"),
        (["info", "/"], "neither a run folder nor a model folder"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run_folder, arguments, sentence) -> None:
    places = {"RUN": str(run_folder), "RUM": str(run_folder.parent / "demp")}
    assert sentence in refused(*(places.get(argument, argument) for argument in arguments))


def test_a_prompt_that_is_no_text_is_refused(run_folder) -> None:
    done = CliRunner().invoke(main, ["generate", str(run_folder), "-p", "-"], input=b"a\xff")
    assert done.exit_code == 2
    assert "the prompt on standard input is not UTF-8 text" in done.output


def test_info_reads_no_weights(run_folder, monkeypatch) -> None:
    """Of 7B parameters that would be 27 GB."""

    def read(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("openxlstm.checkpoint.store._read_tensors", read)
    assert xlstm("info", run_folder).exit_code == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 16 TB")])
def test_a_lack_of_memory_is_a_sentence(run_folder, monkeypatch, error) -> None:
    def hungry(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("openxlstm.infer.generate.pieces", hungry)
    assert "not enough memory (" in refused("generate", run_folder, "-p", "a")


def test_a_run_without_a_model_is_known_as_one(tmp_path) -> None:
    (tmp_path / "resolved.json").write_text("{}")
    assert "has not finished, so it has no model yet" in refused("generate", tmp_path, "-p", "a")


def test_a_traceback_is_there_for_who_asks(run_folder) -> None:
    done = xlstm("--traceback", "generate", run_folder, "-p", "")
    assert done.exit_code == 2
    assert "Traceback" in done.output
    assert "prompt_ids" in done.output


def test_a_bug_of_ours_is_not_dressed_up(run_folder, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("openxlstm.infer.generate.pieces", broken)
    assert isinstance(xlstm("generate", run_folder, "-p", "a").exception, AssertionError)


@pytest.mark.parametrize("name", ["xlstm-125m-7-1", "xlstm-7b"])
def test_info_of_a_preset_adds_up(name: str) -> None:
    facts = json.loads(xlstm("info", name, "--json").stdout)
    assert facts["parameters"] == PRESETS[name].parameters == sum(facts["parts"].values())
    counts = [run["last"] - run["first"] + 1 for run in facts["blocks"]]
    assert sum(counts) == len(facts["pattern"])
    states = sum(count * run["state_bytes_each"] for count, run in zip(counts, facts["blocks"]))
    assert states == facts["state_bytes"]
    blocks = sum(count * run["parameters_each"] for count, run in zip(counts, facts["blocks"]))
    assert blocks == sum(count for part, count in facts["parts"].items() if part.endswith("blocks"))


def test_info_of_a_run_is_that_of_its_model(run_folder) -> None:
    facts = json.loads(xlstm("info", run_folder, "--json").stdout)
    model = load(run_folder / "model")
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["state_bytes"] == model.empty_state(1).nbytes
    assert facts["config"] == model.config.to_dict()
    assert facts["pattern"] == "mms"


def test_info_of_a_shipped_recipe() -> None:
    facts = json.loads(xlstm("info", "stdlib-tiny", "--json").stdout)
    assert facts["from"].startswith("recipe ")
    assert facts["config"]["vocab_size"] == Tokenizer.bytes().vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", ""])
def test_info_says_which_instructions_serve(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "openxlstm", "info"], env={**os.environ, "OPENXLSTM_ISA": isa}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = native()
    said = found if isinstance(found, str) else f"{isa or found.name} instructions"
    assert said in done.stdout


def test_info_of_the_installation() -> None:
    facts = json.loads(xlstm("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert {row["name"] for row in facts["presets"]} == set(PRESETS)
    assert {row["op"] for row in facts["kernels"]} == {"mlstm", "mlstm_step", "slstm", "slstm_step"}


@pytest.mark.parametrize("arguments", [["info"], ["info", "xlstm-7b"]])
def test_piped_tables_are_plain_text(arguments: list[str]) -> None:
    done = xlstm(*arguments)
    assert done.exit_code == 0, done.output
    assert not set("\x1b─│╭") & set(done.stdout)
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    assert "6,865,424,896" in done.stdout


@pytest.mark.parametrize("verb", ["train", "generate", "info"])
def test_help_shows_an_example(verb: str) -> None:
    done = xlstm(verb, "--help")
    assert done.exit_code == 0
    assert f"xlstm {verb} " in done.stdout.split("\n", 1)[1]
