"""The head of a GGUF file, read with suspicion: nothing in it is believed before it fits into the file.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:

  "GGUF", version (u32), number of tensors (u64), number of metadata pairs (u64)
  pairs      key (string), type (u32), value; a string is its length (u64) and UTF-8; an array its type, count, values
  tensors    name (string), number of axes (u32), sizes (u64, fastest first), type (u32), offset (u64)
  data       from the next multiple of `general.alignment` on; offsets are counted from there

A length is compared with what is left of the file before anything is allocated or skipped, so a damaged or hostile
file costs at most what it weighs, and ends in a ValueError that names it. Only this module knows the bytes; the `gguf`
library, which writes such files, is not needed to read them. Values of arrays are skipped: nothing here asks for one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from openxlstm.kernels.quantized import KINDS, bytes_per_row

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TYPES = {0: "f32", 2: "q4_0", 3: "q4_1", 8: "q8_0", 30: "bf16"}  # ggml's number: our kind
OTHER_TYPES = {1: "f16", 6: "q5_0", 7: "q5_1", 10: "q2_K", 11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K", 28: "f64"}
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9

LONGEST_KEY, LONGEST_NAME, MOST_AXES = 65_535, 64, 4  # of the format
LONGEST_STRING = 1 << 28  # bytes; the largest tokenizer.json in use has 33 MB
LARGEST_ALIGNMENT = 1 << 20

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file: its kind, its shape as torch counts (rows first), and its bytes."""

    kind: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Head:
    """What a file says before its numbers."""

    path: Path
    metadata: Mapping[str, Value]  # without arrays
    tensors: Mapping[str, Stored]


def is_gguf(path: Path) -> bool:
    """Whether it is a file that calls itself GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_head(path: Path, architectures: Collection[str]) -> Head:
    """Everything but the numbers.

    Args:
        architectures: values of `general.architecture` that the caller can read; others are refused by name.

    Raises:
        ValueError: damage, truncation, another architecture, a type that this library has not; with file and place.
    """
    with path.open("rb") as file:
        return _Reader(path, file).head(architectures)


class _Reader:
    """A position in the file, and how far it is to the end."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        self._at = file.seek(0)

    def head(self, architectures: Collection[str]) -> Head:
        if self._size < 24 or self._take(4, "the first four bytes") != MAGIC:
            self._refuse("is not a GGUF file: it does not begin with 'GGUF' and a header")
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            order = " (of the other byte order)" if swapped in VERSIONS else ""
            self._refuse(f"is GGUF of version {version}{order}; versions {VERSIONS[0]} and {VERSIONS[1]} are known")
        tensors = self._number("<Q", "the number of tensors")
        pairs = self._number("<Q", "the number of metadata pairs")
        self._check_count(tensors, 28, "tensors")  # a name of 0 bytes, one axis, type and offset
        self._check_count(pairs, 13, "metadata pairs")  # a key of 0 bytes, a type, one byte
        metadata = self._metadata(pairs)
        found = metadata.get("general.architecture")
        if found not in architectures:
            self._refuse(f"holds a model of architecture {found!r}; this library reads {' and '.join(architectures)}, "
                         f"as `xlstm convert` writes them")  # fmt: skip
        alignment = metadata.get("general.alignment", 32)
        fits = isinstance(alignment, int) and 0 < alignment <= LARGEST_ALIGNMENT and not alignment & (alignment - 1)
        if not fits or isinstance(alignment, bool):
            self._refuse(f"has general.alignment={alignment!r}, which must be a power of two up to {LARGEST_ALIGNMENT}")
        assert isinstance(alignment, int)
        return Head(self._path, metadata, self._tensors(tensors, alignment))

    def _metadata(self, pairs: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        keys: set[str] = set()
        for index in range(pairs):
            key = self._string(f"key {index}", LONGEST_KEY)
            if key in keys:
                self._refuse(f"has the key {key!r} twice")
            keys.add(key)
            kind = self._number("<I", f"the type of {key!r}")
            if kind == ARRAY:
                self._skip_array(key)
            else:
                metadata[key] = self._value(kind, key)
        return metadata

    def _value(self, kind: int, key: str) -> Value:
        if kind == STRING:
            return self._string(f"the value of {key!r}", LONGEST_STRING)
        if kind not in SCALARS:
            self._refuse(f"gives {key!r} the type {kind}, which GGUF has not")
        (value,) = struct.unpack(SCALARS[kind], self._take(struct.calcsize(SCALARS[kind]), f"the value of {key!r}"))
        if kind == BOOL and value > 1:
            self._refuse(f"gives {key!r}, a bool, the value {value}")
        return bool(value) if kind == BOOL else value

    def _skip_array(self, key: str) -> None:
        kind = self._number("<I", f"the type of {key!r}")
        count = self._number("<Q", f"the length of {key!r}")
        if kind == STRING:
            self._check_count(count, 8, f"strings in {key!r}")
            for index in range(count):
                self._skip(self._number("<Q", f"string {index} of {key!r}"), f"string {index} of {key!r}")
        elif kind in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[kind]), f"the {count} values of {key!r}")
        else:
            self._refuse(f"gives {key!r} an array of type {kind}; arrays of numbers and strings are known")

    def _tensors(self, count: int, alignment: int) -> dict[str, Stored]:
        said: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(count):
            name = self._string(f"the name of tensor {index}", LONGEST_NAME)
            if name in said:
                self._refuse(f"has the tensor {name!r} twice")
            said[name] = self._tensor(name, alignment)
        start = -(-self._at // alignment) * alignment
        found, end, before = {}, 0, ""
        for name in sorted(said, key=lambda name: said[name][2]):
            kind, shape, offset, nbytes = said[name]
            if offset < end:
                self._refuse(f"puts the tensors {before!r} and {name!r} in one place")
            end, before = offset + nbytes, name
            if start + end > self._size:
                self._refuse(f"ends {start + end - self._size} bytes before the end of its tensor {name!r}; was a copy "
                             f"or a download interrupted?")  # fmt: skip
            found[name] = Stored(kind, shape, start + offset, nbytes)
        return {name: found[name] for name in said}

    def _tensor(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        """Kind, shape, offset and bytes."""
        axes = self._number("<I", f"the axes of {name!r}")
        if not 1 <= axes <= MOST_AXES:
            self._refuse(f"gives {name!r} {axes} axes; a tensor has 1 to {MOST_AXES}")
        shape = tuple(self._number("<Q", f"the sizes of {name!r}") for _ in range(axes))[::-1]
        if 0 in shape or math.prod(shape) > 8 * self._size:  # no kind has less than a byte for two numbers
            self._refuse(f"gives {name!r} the shape {list(shape)}, which cannot be in a file of {self._size} bytes")
        number = self._number("<I", f"the type of {name!r}")
        if number not in TYPES:
            called = OTHER_TYPES.get(number, f"type {number}")
            self._refuse(f"stores {name!r} as {called}; this library reads {', '.join(KINDS)}")
        kind = TYPES[number]
        try:
            nbytes = math.prod(shape[:-1]) * bytes_per_row(kind, shape[-1])
        except ValueError as error:
            raise ValueError(f"{self._path}: {name!r}: {error}") from error
        offset = self._number("<Q", f"the offset of {name!r}")
        if offset % alignment:
            self._refuse(f"puts {name!r} at offset {offset}, which is no multiple of its alignment {alignment}")
        return kind, shape, offset, nbytes

    def _string(self, what: str, longest: int) -> str:
        length = self._number("<Q", f"the length of {what}")
        if length > longest:
            self._refuse(f"says that {what} has {length} bytes; {longest} is the most")
        raw = self._take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is damaged: {what} is not UTF-8 ({error})") from error

    def _number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form), what))
        return value

    def _take(self, count: int, what: str) -> bytes:
        self._check_left(count, what)
        raw = self._file.read(count)
        if len(raw) < count:
            self._refuse("became shorter while it was read")
        self._at += count
        return raw

    def _skip(self, count: int, what: str) -> None:
        self._check_left(count, what)
        self._at = self._file.seek(self._at + count)

    def _check_left(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            beyond = count - (self._size - self._at)
            self._refuse(f"is damaged or incomplete: {what} would end {beyond} bytes behind the end of the file; was a "
                         f"copy or a download interrupted?")  # fmt: skip

    def _check_count(self, count: int, least: int, what: str) -> None:
        if count * least > self._size - self._at:
            self._refuse(f"is damaged or incomplete: {count} {what} cannot be in {self._size} bytes")

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self._path} {why}")
