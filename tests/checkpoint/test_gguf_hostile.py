"""Damaged, truncated and hostile GGUF files: a ValueError that names the file, never a crash or a huge allocation."""

import json
import random
import resource
import struct
import subprocess
import sys

import pytest
import torch

pytest.importorskip("gguf")
from checkpoint.peers import awake

import openxlstm as ox
from openxlstm.checkpoint import gguf
from openxlstm.checkpoint.gguf_write import to_gguf
from openxlstm.models.xlstm import xLSTM, xLSTMConfig

CONFIG = xLSTMConfig(vocab_size=33, width=32, heads=2, pattern="ms", mlstm_width=32, ffn_width=32)
BOMB = 1 << 60


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a sound file."""
    folder = tmp_path_factory.mktemp("good")
    ox.save(awake(xLSTM(CONFIG), 0.05), folder / "model")
    to_gguf(folder / "model", folder / "m.gguf", quant="q4_0")
    return (folder / "m.gguf").read_bytes()


def refused(path, raw):
    path.write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        ox.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def tensor(name, shape, kind, offset):
    axes = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return string(name) + axes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair("general.architecture", 8, string("xlstm"))


def crafted(pairs=(ARCHITECTURE,), tensors=(), version=3, counts=None, data=b"\0" * 4096, magic=b"GGUF"):
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


F32 = 0
HOSTILE = {
    "empty": (b"", "is not a GGUF file"),
    "short": (b"GGUF\3\0\0\0", "is not a GGUF file"),
    "another magic": (crafted(magic=b"GGML"), "is not a GGUF file"),
    "version 1": (crafted(version=1), "is GGUF of version 1; versions 2 and 3 are known"),
    "big-endian": (crafted(version=3 << 24), "of the other byte order"),
    "2^60 tensors": (crafted(counts=(BOMB, 1)), f"{BOMB} tensors cannot be in"),
    "2^60 pairs": (crafted(counts=(0, BOMB)), f"{BOMB} metadata pairs cannot be in"),
    "key of 2^60 bytes": (crafted([struct.pack("<Q", BOMB)]), f"key 0 has {BOMB} bytes; 65535 is the most"),
    "key behind the end": (crafted([struct.pack("<Q", 60_000)]), "bytes behind the end of the file"),
    "value of 2^60 bytes": (crafted([pair("a", 8, struct.pack("<Q", BOMB))]), f"has {BOMB} bytes"),
    "value behind the end": (crafted([pair("a", 8, struct.pack("<Q", 1 << 27))]), "bytes behind the end of the file"),
    "key that is no text": (crafted([pair(b"\xff\xfe", 4, b"\0" * 4)]), "key 0 is not UTF-8"),
    "unknown type": (crafted([pair("a", 77, b"")]), "the type 77, which GGUF has not"),
    "a bool of 2": (crafted([pair("a", 7, b"\2")]), "a bool, the value 2"),
    "a key twice": (crafted([ARCHITECTURE, ARCHITECTURE]), "has the key 'general.architecture' twice"),
    "array of 2^60 numbers": (crafted([pair("a", 9, struct.pack("<IQ", 4, BOMB))]), "bytes behind the end"),
    "array of 2^60 strings": (crafted([pair("a", 9, struct.pack("<IQ", 8, BOMB))]), "strings in 'a' cannot be in"),
    "array of arrays": (crafted([pair("a", 9, struct.pack("<IQ", 9, 1))]), "an array of type 9"),
    "strings behind the end": (
        crafted([pair("a", 9, struct.pack("<IQQ", 8, 1, BOMB))]), "string 0 of 'a' would end"
    ),
    "a Llama": (crafted([pair("general.architecture", 8, string("llama"))]), "a model of architecture 'llama'"),
    "no architecture": (crafted([]), "a model of architecture None"),
    "alignment 0": (crafted([ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 0))]), "alignment=0"),
    "alignment 24": (crafted([ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment 2^31": (crafted([ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 1 << 31))]), "power of"),
    "alignment a text": (crafted([ARCHITECTURE, pair("general.alignment", 8, string("32"))]), "alignment='32'"),
    "no axes": (crafted(tensors=[tensor("t", (), F32, 0)]), "gives 't' 0 axes"),
    "2^32 - 1 axes": (crafted(tensors=[string("t") + struct.pack("<I", 2**32 - 1) + b"\0" * 64]), "4294967295 axes"),
    "an axis of 0": (crafted(tensors=[tensor("t", (4, 0), F32, 0)]), "the shape [0, 4], which cannot be in a file"),
    "sizes of 2^60": (crafted(tensors=[tensor("t", (BOMB, BOMB, BOMB), F32, 0)]), "which cannot be in a file of"),
    "2^64 numbers": (crafted(tensors=[tensor("t", (1 << 32, 1 << 32), F32, 0)]), "which cannot be in a file of"),
    "Q4_K": (crafted(tensors=[tensor("t", (256,), 12, 0)]), "stores 't' as q4_K; this library reads f32, bf16"),
    "type 4711": (crafted(tensors=[tensor("t", (32,), 4711, 0)]), "stores 't' as type 4711"),
    "half a block": (crafted(tensors=[tensor("t", (48,), 8, 0)]), "a row of 48 numbers does not divide"),
    "a crooked offset": (crafted(tensors=[tensor("t", (4,), F32, 17)]), "offset 17, which is no multiple"),
    "offset 2^60": (crafted(tensors=[tensor("t", (4,), F32, BOMB)]), "bytes before the end of its tensor 't'"),
    "offset 2^64 - 32": (crafted(tensors=[tensor("t", (4,), F32, 2**64 - 32)]), "before the end of its tensor 't'"),
    "one place for two": (
        crafted(tensors=[tensor("t", (64,), F32, 0), tensor("u", (4,), F32, 32)]), "'t' and 'u' in one place"
    ),
    "a name twice": (crafted(tensors=[tensor("t", (4,), F32, 0)] * 2), "has the tensor 't' twice"),
    "a name of 65 bytes": (crafted(tensors=[tensor("t" * 65, (4,), F32, 0)]), "65 bytes; 64 is the most"),
    "no config": (crafted(tensors=[tensor("t", (4,), F32, 0)]), "has no openxlstm.config"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_is_refused(case, tmp_path):
    raw, sentence = HOSTILE[case]
    assert sentence in refused(tmp_path / "m.gguf", raw)


def said(text, form=1):
    """A file whose config is this text."""
    pairs = [ARCHITECTURE, pair(gguf.CONFIG, 8, string(text)), pair(gguf.FORMAT, 4, struct.pack("<I", form))]
    return crafted(pairs, [tensor("output_norm.weight", (32,), F32, 0)])


CONFIGS = {
    "no JSON": ("{", "is not JSON"),
    "nested without end": ("[" * 200_000, "is not JSON"),
    "a list": ("[1]", "must hold an object; it holds list"),
    "an unknown field": (json.dumps({"widht": 3}), "did you mean 'width'"),
    "a billion blocks": (json.dumps(CONFIG.to_dict() | {"pattern": "m" * 2_000_000}), "means 2000000 blocks, and the"),
    "a huge width": (json.dumps(CONFIG.to_dict() | {"width": 2**62, "pattern": "m"}), f"says width={2**62}, and all"),
    "a huge vocabulary": (
        json.dumps(CONFIG.to_dict() | {"vocab_size": 10**30, "pattern": "m"}),
        "vocab_size must be int",
    ),
    "another model": (json.dumps(CONFIG.to_dict() | {"vocab_size": 3, "pattern": "m"}), "lacks"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_the_file_cannot_mean_is_refused(case, tmp_path):
    text, sentence = CONFIGS[case]
    assert sentence in refused(tmp_path / "m.gguf", said(text))


def test_a_newer_format_is_refused(tmp_path):
    found = refused(tmp_path / "m.gguf", said(json.dumps(CONFIG.to_dict()), form=2))
    assert "has openxlstm.format=2; this version of openxlstm reads up to 1" in found


def test_every_truncation_is_noticed(good, tmp_path):
    """At every byte of the beginning, at many of the rest, and one byte before the end of the last tensor."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    last = max(stored.begin + stored.nbytes for stored in gguf.open_gguf(path).head.tensors.values())
    for length in [*range(0, 300), *range(300, last, 197), last - 1]:
        refused(path, good[:length])


def opened_or_refused(path):
    """Anything but a ValueError that names the file fails."""
    said = None
    try:
        return gguf.open_gguf(path)
    except ValueError as error:
        said = str(error)
    assert str(path) in said
    return None


def test_flipped_bytes_are_refused_or_harmless(good, tmp_path):
    """Numbers may change: they have no checksum in this format."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    head = min(stored.begin for stored in gguf.open_gguf(path).head.tensors.values())
    draw = random.Random(5)
    outcomes = {"refused": 0, "read": 0}
    for trial in range(250):
        raw = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 8))):
            raw[draw.randrange(24 if trial % 4 == 0 else head)] = draw.choice(
                (0, 1, 127, 128, 255, draw.randrange(256))
            )
        path.write_bytes(raw)
        opened = opened_or_refused(path)
        outcomes["refused" if opened is None else "read"] += 1
        if opened is not None:
            for stored in opened.head.tensors.values():
                assert 0 < stored.begin < stored.begin + stored.nbytes <= len(raw)
    assert outcomes["refused"] > 60, outcomes
    assert outcomes["read"] > 4, "text in metadata may change without harm"


def test_spliced_pieces_are_refused_or_harmless(good, tmp_path):
    """Pieces cut out, doubled or filled with one byte, which moves everything behind them."""
    path, draw = tmp_path / "m.gguf", random.Random(6)
    for _ in range(60):
        a, length = draw.randrange(6000), draw.randrange(1, 64)
        piece = draw.choice((b"", good[a : a + length] * 2, b"\xff" * length))
        path.write_bytes(good[:a] + piece + good[a + length :])
        opened_or_refused(path)


def test_any_numbers_in_the_blocks_compute(good, tmp_path):
    """Noise as weights, infinite scales included: logits may be NaN, and no memory outside the file is read."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    head = min(stored.begin for stored in gguf.open_gguf(path).head.tensors.values())
    noise = random.Random(7).randbytes(len(good) - head)
    path.write_bytes(good[:head] + noise)
    assert ox.load(path)(torch.tensor([[1, 32, 0]]))[0].shape == (1, 3, 33)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="limits of address space")
def test_no_hostile_file_makes_the_reader_allocate(tmp_path):
    """All of them in a process that may take 64 MB more than it has."""
    for index, (raw, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{index}.gguf").write_bytes(raw)
    code = (
        "import pathlib, re, resource, sys, openxlstm as ox; from openxlstm.checkpoint import gguf\n"
        "ox.load\n"
        "size = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: ox.load(path)\n"
        "    except ValueError as error: assert str(path) in str(error)\n"
        "    else: sys.exit(f'{path} was read')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
