"""GGUF files: there and back, what is stored how, a model over a mapped file, and complete or not there at all."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("gguf")
from checkpoint.peers import awake
from gguf import GGUFReader
from gguf.quants import dequantize as oracle
from models.small_models import tokens
from support import refused

import openxlstm as ox
from openxlstm.checkpoint import gguf, gguf_write
from openxlstm.checkpoint.convert import convert, export
from openxlstm.checkpoint.gguf_write import kind_of, to_gguf
from openxlstm.checkpoint.rules_gguf import matrices, rules
from openxlstm.checkpoint.store import load_config
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.nn.quant import QuantEmbedding, QuantLinear

NEURIPS = xLSTMConfig(vocab_size=257, width=64, heads=2, pattern="msm", mlstm_width=96, ffn_width=40, bias=True, conv=3)
LARGE = xLSTMLargeConfig(vocab_size=257, width=64, blocks=2, heads=2, qk_width=32, v_width=96, ffn_width=160)
CONFIGS = {"xlstm": NEURIPS, "large": LARGE}
KINDS = ("f32", "bf16", "q8_0", "q4_0", "q4_1")


def model_of(kind, **changes):
    config = replace(CONFIGS[kind], **changes)
    return awake((xLSTM if kind == "xlstm" else xLSTMLarge)(config), 0.05)


def folder_of(model, path):
    ox.save(model, path)
    Tokenizer.bytes().save(path / "tokenizer.json")
    return path


@pytest.mark.parametrize(("quant", "tied"), [*((kind, False) for kind in KINDS), ("q8_0", True)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_model_computes_with_the_numbers_that_the_gguf_library_reads(kind, quant, tied, tmp_path):
    """Against an ordinary model filled with the library's own dequantised tensors: logits and state."""
    model = model_of(kind, tie_embeddings=tied)
    report = to_gguf(folder_of(model, tmp_path / "model"), tmp_path / "m.gguf", quant=quant)
    loaded = ox.load(tmp_path / "m.gguf")
    assert loaded.config == model.config
    assert not loaded.training
    named = {row.theirs[0]: row.ours[0] for row in rules(model.config)}
    oracles = {}
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        wide = torch.from_numpy(oracle(tensor.data, tensor.tensor_type).copy())
        oracles[named[tensor.name]] = wide.reshape(model.state_dict()[named[tensor.name]].shape)
    dense = type(model)(model.config)
    dense.load_state_dict(oracles)
    again = ox.load(tmp_path / "m.gguf", dtype=torch.float32)  # dequantised: the same numbers to the bit
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, oracles[name]), name
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.weight, oracles[f"{name}.weight"]), name  # packed or not, to the bit
    packed = any(isinstance(module, QuantLinear) and module.packed for module in loaded.modules())

    def close(a, b, name):
        if packed:  # inputs of packed matrices have 15 bits per block of 32
            assert float((a - b).abs().max()) <= 2e-3 * float(b.abs().max().clamp_min(1e-6)), name
        else:
            torch.testing.assert_close(a, b, msg=name)

    x = tokens(2, 17)
    for T in (17, 1):
        want, memory = dense(x[:, :T])
        got, state = loaded(x[:, :T])
        close(got, want, "logits")
        for (name, a), (_, b) in zip(state.named_tensors(), memory.named_tensors(), strict=True):
            close(a, b, name)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    if quant == "f32":
        assert all(torch.equal(oracles[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_stored_how():
    """Gates, norms, convolutions, R and block-diagonal maps stay fp32; rows of 40 do not divide into blocks of 32."""
    for config in CONFIGS.values():
        for name in (row.ours[0] for row in rules(config)):
            wide = not name.endswith("weight") or re.search(r"gate_|gate_preact\.(?!ogate)|norm|conv|\.[qkv]\.", name)
            if name.endswith("ogate_preact.weight") or (config is LARGE and re.search(r"\.[qkv]\.weight", name)):
                wide = False
            if "igate_preact" in name or "fgate_preact" in name:
                wide = True
            assert (kind_of(name, config, "q8_0") == "f32") == bool(wide), name
            assert kind_of(name, config, "f32") == "f32"
    for name in ("embedding.weight", "head.weight"):
        assert kind_of(name, NEURIPS, "q4_0") == "q8_0"
    assert kind_of("backbone.embeddings.weight", LARGE, "q4_1") == "q8_0"
    assert kind_of("stack.blocks.1.ffn_down.weight", NEURIPS, "q4_0") == "bf16"
    assert kind_of("stack.blocks.1.ffn_down.weight", NEURIPS, "q8_0") == "bf16"
    assert kind_of("backbone.blocks.0.ffn.proj_up.weight", LARGE, "q4_1") == "q4_1"


def test_matrices_stay_in_their_blocks(tmp_path):
    report = to_gguf(folder_of(model_of("xlstm"), tmp_path / "model"), tmp_path / "m.gguf", quant="q4_0")
    model = ox.load(tmp_path / "m.gguf")
    assert isinstance(model.embedding, QuantEmbedding)
    assert isinstance(model.stack.blocks[0].up, QuantLinear)
    assert (model.stack.blocks[0].up.kind, model.stack.blocks[1].ffn_down.kind) == ("q4_0", "bf16")
    quantised = {name: m for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))}
    mapped = [module for module in quantised.values() if isinstance(module, QuantEmbedding) or not module.packed]
    storages = {module.blocks.untyped_storage().data_ptr() for module in mapped}  # packed ones were read
    assert len(storages) == 1, "one mapped file, no copies"
    assert report.wider == ("blk.1.ffn_down.weight",)
    assert not any(p.requires_grad for p in model.parameters())
    assert matrices(NEURIPS) == {f"{name}.weight" for name in quantised}


def test_such_a_model_is_neither_trained_nor_saved_until_it_is_dequantised(tmp_path):
    to_gguf(folder_of(model_of("large"), tmp_path / "model"), tmp_path / "m.gguf")
    model = ox.load(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"q8_0 of a GGUF file cannot be trained; load the file with dtype="):
        model.train()
    for write in (lambda: ox.save(model, tmp_path / "out"), lambda: export(model, tmp_path / "out", to="hf")):
        with pytest.raises(ValueError, match=r"stay quantised in a GGUF file, which is its saved form; load it with"):
            write()
    assert not (tmp_path / "out").exists()
    dense = ox.load(tmp_path / "m.gguf", dtype=torch.float32).train()
    x = tokens(1, 5)
    dense(x)[0].sum().backward()
    ox.save(dense, tmp_path / "out")
    assert torch.equal(ox.load(tmp_path / "out")(x)[0], dense.eval()(x)[0])


def test_the_tokenizer_and_special_ids_travel_and_come_back(tmp_path):
    folder = folder_of(model_of("xlstm"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "bos_token_id": None}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    to_gguf(folder, tmp_path / "m.gguf", quant="q8_0")
    text = gguf.tokenizer_json(tmp_path / "m.gguf")
    assert Tokenizer.from_json(text).sha256 == Tokenizer.bytes().sha256
    reader = GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "xlstm"
    assert said["xlstm.block_count"] == 3
    assert said["xlstm.embedding_length"] == 64
    assert said["tokenizer.ggml.eos_token_id"] == 256
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    again = to_gguf(tmp_path / "m.gguf", tmp_path / "n.gguf", quant="q8_0")  # from a GGUF file
    assert again.tokenizer
    assert again.layout == "gguf"
    report = convert(tmp_path / "n.gguf", tmp_path / "back", to="ours")
    assert (report.layout, "tokenizer.json" in report.files) == ("gguf", True)
    assert Tokenizer.from_file(tmp_path / "back").sha256 == Tokenizer.bytes().sha256
    x = tokens(1, 9)
    torch.testing.assert_close(
        ox.load(tmp_path / "back")(x)[0], ox.load(tmp_path / "m.gguf")(x)[0], rtol=0, atol=2e-3
    )  # packed: 15 bits
    ox.save(model_of("xlstm"), tmp_path / "bare")
    assert not to_gguf(tmp_path / "bare", tmp_path / "bare.gguf").tokenizer
    with pytest.raises(ValueError, match=r"bare.gguf carries no tokenizer"):
        gguf.tokenizer_json(tmp_path / "bare.gguf")
    assert load_config(tmp_path / "bare.gguf") == NEURIPS


def test_a_foreign_layout_is_quantised_too(tmp_path):
    model = model_of("large")
    export(model, tmp_path / "hf", to="hf")
    assert to_gguf(tmp_path / "hf", tmp_path / "a.gguf", quant="q4_1").layout == "hf"
    to_gguf(folder_of(model, tmp_path / "ours"), tmp_path / "b.gguf", quant="q4_1")
    x = tokens(1, 9)
    assert torch.equal(ox.load(tmp_path / "a.gguf")(x)[0], ox.load(tmp_path / "b.gguf")(x)[0])


def test_arguments(tmp_path):
    folder = folder_of(model_of("xlstm"), tmp_path / "model")
    unchecked = getattr(to_gguf, "__wrapped__", to_gguf)  # the runner's type check would speak first
    assert "quant='q5_0' must be one of q8_0, q4_0" in refused(unchecked, folder, tmp_path / "m.gguf", quant="q5_0")
    assert "must end in .gguf" in refused(to_gguf, folder, tmp_path / "m")
    (tmp_path / "m.gguf").write_text("mine")
    assert "exists; name a new file" in refused(to_gguf, folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    assert "cannot be a file, since" in refused(to_gguf, folder, tmp_path / "m.gguf" / "x.gguf")
    to_gguf(folder, tmp_path / "n.gguf")
    assert "carries its config" in refused(ox.load, tmp_path / "n.gguf", config={})
    assert "carries its config" in refused(to_gguf, tmp_path / "n.gguf", tmp_path / "o.gguf", config={})
    model = model_of("xlstm")
    model.stack.blocks[0].up.weight.data[3, 5] = float("nan")
    ox.save(model, tmp_path / "bad")
    assert "blocks.0.up.weight holds nan, which q8_0 cannot store" in refused(
        to_gguf, tmp_path / "bad", tmp_path / "o.gguf"
    )
    assert not (tmp_path / "o.gguf").exists()
    assert not list(tmp_path.glob(".*partial"))


KILLED = """
import os, signal, sys
from openxlstm.checkpoint import gguf_write
encode, calls = gguf_write._encode, []
def dying(*arguments):
    calls.append(0)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
gguf_write._encode = dying
gguf_write.to_gguf(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_conversion_leaves_nothing_under_the_name(tmp_path):
    folder = folder_of(model_of("xlstm"), tmp_path / "model")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, folder, tmp_path / "m.gguf"], capture_output=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.gguf.partial", "model"]
    to_gguf(folder, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="a limit stands for a full disk")
def test_a_full_disk_leaves_nothing(tmp_path):
    folder = folder_of(model_of("xlstm"), tmp_path / "model")
    code = (
        "import resource, signal, sys; from openxlstm.checkpoint.gguf_write import to_gguf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "try:\n  to_gguf(sys.argv[1], sys.argv[2])\nexcept OSError as error:\n  print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "m.gguf"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_disk_changed_is_noticed(tmp_path, monkeypatch):
    folder = folder_of(model_of("xlstm"), tmp_path / "model")
    verify = gguf_write._verify

    def spoiling(path, *arguments):
        with path.open("rb+") as file:
            file.seek(-100, 2)
            byte = file.read(1)
            file.seek(-100, 2)
            file.write(bytes([byte[0] ^ 1]))
        return verify(path, *arguments)

    monkeypatch.setattr(gguf_write, "_verify", spoiling)
    with pytest.raises(OSError, match=r"was not written as it was made; is the disk sound"):
        to_gguf(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_progress_ends_at_the_end(tmp_path):
    told = []
    to_gguf(
        folder_of(model_of("large"), tmp_path / "model"), tmp_path / "m.gguf", quant="q4_0",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
