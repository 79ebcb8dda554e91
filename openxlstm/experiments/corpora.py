"""Texts that a machine has without a network: the Python library, and a dictionary that Debian ships.

stdlib   the source of the Python library, which is everywhere (`data.corpus`)
gcide    the GNU Collaborative International Dictionary of English, Webster's of 1913 above all: `apt-get install
         dict-gcide`, GPL-3+, used and not redistributed
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from openxlstm.data.tokens import write_atomically

DICTIONARY = Path("/usr/share/dictd/gcide.dict.dz")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # of the index: base 64, RFC 2229's servers
ENTRIES = 200  # a document is this many entries in a row: one alone has 300 bytes


def locate(name: str, cache: Path) -> str:
    """What a recipe calls a corpus: "stdlib", or a file that is made in `cache` if it is not there.

    Raises:
        ValueError: the corpus is not on this machine, and how it gets there; a name that is none.
    """
    if name == "stdlib":
        return name
    if name != "gcide":
        raise ValueError(f"corpus {name!r} must be stdlib or gcide")
    if absent := missing(name):
        raise ValueError(absent)
    file = cache / "gcide.jsonl"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(json.dumps({"text": text}) + "\n" for text in dictionary(DICTIONARY)))
    return str(file)


def missing(name: str) -> str | None:
    """Why a corpus cannot be had on this machine, and how it gets there; None: it can."""
    return None if name == "stdlib" or DICTIONARY.exists() else f"there is no {DICTIONARY}: apt-get install dict-gcide"


def dictionary(compressed: Path) -> list[str]:
    """Documents of a dictd dictionary: its entries in the order of the file, ENTRIES of them each, without the preface.

    The index beside it has a line per headword: word, offset and length, both in base 64.
    """
    with gzip.open(compressed) as file:  # a .dz is a gzip file with an index of its blocks in the header
        content = file.read()
    lines = compressed.with_name(compressed.name.replace(".dict.dz", ".index")).read_text(encoding="utf-8").splitlines()
    places = {
        (_number(offset), _number(length))
        for word, offset, length in (line.split("\t")[:3] for line in lines)
        if not word.startswith("00")  # what the dictionary says about itself
    }
    entries = [content[offset : offset + length].decode(errors="replace").strip() for offset, length in sorted(places)]
    return ["\n\n".join(entries[first : first + ENTRIES]) for first in range(0, len(entries), ENTRIES)]


def _number(text: str) -> int:
    value = 0
    for letter in text:
        value = 64 * value + DIGITS.index(letter)
    return value
