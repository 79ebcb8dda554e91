"""`xlstm convert`: what it prints, and what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner

from openxlstm.checkpoint.store import load, save
from openxlstm.cli import main
from openxlstm.cli.convert import Bar, read_size
from openxlstm.models.xlstm import xLSTM, xLSTMConfig


@pytest.fixture
def model(tmp_path):
    """A model in the folder of a run."""
    model = xLSTM(xLSTMConfig(vocab_size=23, width=12, heads=3, pattern="ms", mlstm_width=24, ffn_width=20))
    save(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "tokenizer.json").write_text("{}")
    return model


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_there_and_back(model, tmp_path):
    done = run(tmp_path / "run", tmp_path / "nx", "--to", "nxai", "--slstm-layout", "cuda")
    assert done.exit_code == 0, done.output
    assert "NX-AI xlstm, 3 files" in done.output
    assert "30 tensors read again: equal to the source bit by bit" in done.output
    done = run(tmp_path / "nx", tmp_path / "hf", "--to", "hf", "--json", "--shard-size", "4KB")
    report = json.loads(done.output)
    assert (report["layout"], report["to"], report["verified"], report["rounded"]) == ("nxai", "hf", 30, 0.0)
    assert "tokenizer.json" in report["files"]
    assert "import openxlstm.hf before" in report["notes"][0]
    again = load(tmp_path / "hf")
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "b", "--to", "hf"], "there is no"),
        (["RUN", "RUN", "--to", "hf"], "exists and holds model"),
        (["RUN", "NEW", "--to", "nxai-large"], "Use to='nxai'"),
        (["RUN", "NEW", "--to", "ours", "--shard-size", "5 bananas"], "must be a positive size such as 500MB"),
        (["RUN", "NEW", "--to", "gguf"], "must end in .gguf: the model becomes one file"),
        (["RUN", "NEW", "--to", "ours", "--quant", "q8_0"], "--quant is about GGUF files; end TARGET in .gguf"),
        (["RUN", "NEW"], "--to is missing"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, sentence, model, tmp_path):
    places = {"RUN": tmp_path / "run", "NEW": tmp_path / "new"}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "new").exists()


def test_a_bar_shows_what_it_is_told(capsys):
    with Bar("out", shown=True) as tell:
        tell(5, 10)
    with Bar("out", shown=False) as tell:
        tell(10, 10)
    assert capsys.readouterr().out == ""  # progress goes to standard error


def test_sizes():
    assert [read_size(text) for text in ("500MB", "5gb", "2GiB", "1.5 kB", "7", "7B")] == [
        500_000_000, 5_000_000_000, 2**31, 1500, 7, 7,
    ]  # fmt: skip
    for text in ("", "0", "-5MB", "5TB", "GB"):
        with pytest.raises(ValueError, match="must be a positive size"):
            read_size(text)
