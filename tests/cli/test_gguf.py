"""GGUF files on the command line: written, checked, described, read by every verb that reads a model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("gguf")

import openxlstm as ox
from openxlstm.bench import random_gguf
from openxlstm.cli import main
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig
from openxlstm.tasks.scoring import perplexity, read_text_ids

CONFIG = xLSTMConfig(vocab_size=257, width=32, heads=2, pattern="ms", mlstm_width=64, ffn_width=40)
LARGE = xLSTMLargeConfig(vocab_size=257, width=64, blocks=2, heads=2, ffn_width=160)
TEXT = "def f(x):\n    return x + 1\n" * 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with a model and its tokenizer, a text, and the model as a GGUF file."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(3)
    ox.save(ox.xLSTM(CONFIG), folder / "run" / "model")
    ox.Tokenizer.bytes().save(folder / "run" / "model" / "tokenizer.json")
    (folder / "text.py").write_text(TEXT)
    done = run("convert", folder / "run", folder / "m.gguf", "--quant", "q4_0", "--check", folder / "text.py")
    assert done.exit_code == 0, done.output
    (folder / "said").write_text(done.output)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_what_convert_says(place):
    said = (place / "said").read_text()
    assert "GGUF, q4_0, " in said
    assert "bf16, since their rows do not divide into blocks of 32: 1 (blk.1.ffn_down.weight)" in said
    assert "tokens)" not in said
    assert f"of {len(TEXT)} tokens" in said
    assert "inside" in said


def test_the_check_is_the_perplexity_of_both_models(place, tmp_path):
    done = run("convert", place / "run", tmp_path / "a.gguf", "--check", place / "text.py", "--json")
    report = json.loads(done.output)
    ids = read_text_ids(place / "text.py", ox.Tokenizer.bytes())
    model = ox.load(place / "run" / "model")
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0][0].double()
    mean = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert report["check"]["source"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert report["check"]["target"] == pytest.approx(perplexity(ox.load(tmp_path / "a.gguf"), ids))
    assert abs(report["check"]["change"]) < 5e-3  # of weights that nobody trained
    assert (report["quant"], report["tokenizer"], report["wider"]) == ("q8_0", True, ["blk.1.ffn_down.weight"])


def test_info(place):
    facts = json.loads(run("info", place / "m.gguf", "--json").output)
    assert facts["config"] == CONFIG.to_dict()
    assert facts["file_bytes"] == (place / "m.gguf").stat().st_size
    assert facts["stored"]["q8_0"]["tensors"] == 2
    assert "q4_0: 3 tensors" in run("info", place / "m.gguf").output


def test_generate_writes_what_the_dequantised_model_writes(place, tmp_path):
    done = run("convert", place / "m.gguf", tmp_path / "wide", "--to", "ours")
    assert done.exit_code == 0, done.output
    texts = [
        json.loads(run("generate", model, "-p", "def ", "-n", 20, "-t", 0, "--json").output)["text"]
        for model in (place / "m.gguf", tmp_path / "wide")
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.slow  # lm-eval takes seconds to import
def test_lm_eval_reads_the_file(place):
    adapter = pytest.importorskip("openxlstm.tasks.lm_eval")
    lm = adapter.OpenXLSTMLM(str(place / "m.gguf"), device="cpu")
    assert lm.tokenizer_name == ox.Tokenizer.bytes().sha256
    assert lm.model.config == CONFIG


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert", "RUN", "FILE"], "m.gguf exists; name a new file"),
        (["convert", "RUN", "NEW", "--to", "ours", "--check", "TEXT"], "--check is about GGUF files"),
        (["convert", "RUN", "NEW.gguf", "--quant", "q5_0"], "'q5_0' is not one of"),
        (["convert", "RUN", "NEW.gguf", "--to", "hf", "--quant", "q8_0"], "--quant is about GGUF files"),
        (["generate", "TEXT", "-p", "x"], "is a file; a model is a folder with a config.json, or a file that ends in"),
        (["info", "NEW.gguf"], "there is no"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, sentence, place, tmp_path):
    places = {"RUN": place / "run", "FILE": place / "m.gguf", "TEXT": place / "text.py", "NEW": tmp_path / "new"}
    places["NEW.gguf"] = tmp_path / "new.gguf"
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reader", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, LARGE], ids=["xlstm", "large"])
def test_a_file_of_random_weights_loads_and_computes(config, reader, tmp_path):
    report = random_gguf.write_random(config, tmp_path / "m.gguf", "q4_0")
    assert report.tokenizer
    found = random_gguf.measure_load(tmp_path / "m.gguf", rounds=2, tokens=102, reader=reader)
    assert found["file_bytes"] == report.bytes
    assert found["later_over_earlier"] == found["seconds_after_102"] / found["seconds_after_100"]
    with pytest.raises(ValueError, match="tokens=100 must be more than 100"):
        random_gguf.measure_load(tmp_path / "m.gguf", tokens=100)
    logits, _ = ox.load(tmp_path / "m.gguf")(torch.tensor([[1, 2, 256]]))
    assert logits.isfinite().all()
    assert logits.std() > 1e-3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tokens", "200"], "--tokens 200 is about a file that is there: it needs --load"),
        (["--load", "--reader", "bf16"], "--reader bf16 says who reads tokens: it needs --tokens"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, sentence, tmp_path, monkeypatch, capsys):
    target = tmp_path / "m.gguf"
    monkeypatch.setattr("sys.argv", ["random_gguf", "xlstm-7b", str(target), *options])
    with pytest.raises(SystemExit):
        random_gguf.main()
    assert sentence in capsys.readouterr().err
    assert not target.exists()


PEAK = """
import sys
from pathlib import Path
import torch
from openxlstm.bench.random_gguf import measure_load, peak_memory, write_random
from openxlstm.checkpoint.gguf import load as mapped
from openxlstm.models.xlstm_large import xLSTMLargeConfig
import gguf as library, gguf.quants
config = xLSTMLargeConfig(vocab_size=4000, width=1024, blocks=12, heads=4)
path = Path(sys.argv[1])
if sys.argv[2] == "write":
    before = peak_memory()
    print(write_random(config, path, "q8_0").bytes, peak_memory() - before)
else:
    from openxlstm.infer.decoder import decoder
    tiny = path.with_name("tiny.gguf")  # what loading and decoding import and allocate by themselves
    write_random(xLSTMLargeConfig(vocab_size=300, width=64, blocks=1, heads=4), tiny, "q8_0")
    model = mapped(tiny, device="cpu", dtype=None)
    decoder(model, model.empty_state(1)).step(torch.tensor([1]))
    before = peak_memory()
    print(path.stat().st_size, measure_load(path, rounds=1)["peak_bytes"] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of memory")
def test_memory_of_writing_is_a_few_tensors_and_of_a_loaded_model_its_file(tmp_path):
    """A model of 160M parameters, 640 MB in fp32, 170 MB in q8_0. Dequantised at once it would take five times more."""
    found = {}
    for what in ("write", "load"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path / "m.gguf", what], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found[what] = tuple(map(int, done.stdout.split()))
    size, peak = found["write"]
    assert size > 150e6
    assert peak < 0.35 * 4 * 160e6, "a few tensors of at most 17 MB in fp32, and what the library takes"
    size, peak = found["load"]
    assert peak < 1.1 * size + 100e6, "the file, what building a model imports, and 1 MiB of weights in fp32"
