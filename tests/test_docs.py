"""Documents run: every `sh` and `python` block of README.md and docs/ is executed, and relative links lead somewhere.

A block that cannot run in a test says why in the line before it: `<!-- not run: it trains for five minutes -->`. The
blocks of one document run in order, in one empty folder of their own, with the tools of this Python first in PATH; a
file that one block writes is there for the next. Each block is a program of its own, as a reader would paste it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SECONDS = 120  # a block that takes longer belongs behind a not-run comment

RUN = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SHOWN = {"text", "toml", "json", "jsonl", "yaml", "make", "diff", "bibtex", "math", "mermaid", "cpp", "html"}  # read
NOT_RUN = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->\s*$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    code: str
    reason: str | None  # why it is not run


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page, with the reason in the last line of text before it."""
    found: list[Block] = []
    before, fence, language, start, indent = "", "", "", 0, 0
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        opening = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line)
        if fence and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            mark = NOT_RUN.search(before)
            found.append(Block(start, language, "\n".join(code), mark[1] if mark else None))
            fence, before = "", ""
        elif fence:
            code.append(line[indent:] if not line[:indent].strip() else line)
        elif opening:
            fence, language, start, code = opening[1], opening[2], number, []
            indent = len(line) - len(line.lstrip())
        elif line.strip():
            before = line
    assert not fence, f"the block that opens at line {start} is never closed"
    return found


def links(text: str) -> list[str]:
    """Targets of links and images outside code, in Markdown and in HTML."""
    text = re.sub(r"(?ms)^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", text)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """What `#...` may name on a page: its headings as GitHub spells them, and explicit ids."""
    text = re.sub(r"(?ms)^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", text)
    headings = re.findall(r"(?m)^#+\s+(.*?)\s*#*$", text)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title).lower()).replace(" ", "-") for title in headings]
    return {*plain, *re.findall(r"(?:id|name)=\"([^\"]+)\"", text)}


def environment(folder: Path) -> dict[str, str]:
    """This Python's tools first, the package importable, and `xlstm` even where the package is not installed."""
    tools = Path(sys.executable).parent
    path = [str(tools), os.environ["PATH"]]
    if not (tools / "xlstm").exists():
        shim = folder.parent / "bin" / "xlstm"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m openxlstm "$@"\n')
        shim.chmod(0o755)
        path.insert(0, str(shim.parent))
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}


def page_name(path: Path) -> str:
    """README.md, docs/math.md."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in RUN for b in blocks(page.read_text()))], ids=page_name
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    surroundings = environment(folder)
    for block in blocks(page.read_text()):
        if block.language not in RUN or block.reason is not None:
            continue
        where = f"{page_name(page)}:{block.line}"
        try:
            done = subprocess.run(
                [*RUN[block.language], block.code],
                cwd=folder, env=surroundings, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.fail(f"{where} runs for more than {SECONDS} s; shorten it, or say <!-- not run: why --> before it")
        assert done.returncode == 0, (
            f"{where} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_names_a_language_that_we_run_or_show(page: Path) -> None:
    wrong = [
        f"{page_name(page)}:{block.line} {block.language or 'has no language'}"
        for block in blocks(page.read_text())
        if block.language not in RUN.keys() | SHOWN
    ]
    assert not wrong, f"{wrong}: write sh or python for what runs, {', '.join(sorted(SHOWN))} for what is read"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links(page.read_text()):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
            continue  # another site, or mail
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            broken.append(f"{link}: no such heading")
    assert not broken, f"{page_name(page)}: " + "; ".join(broken)


def test_blocks_links_and_headings_are_found() -> None:
    page = "\n".join([
        "# A `page`: *here*", "[a](x.md#y) ![b](<p.png>) `[no](no.md)` <img src=\"q.png\">",
        "```sh", "echo [no](no.md)", "```",
        "<!-- not run: five minutes -->", "```python", "pass", "```",
        "- item", "  ~~~text", "  three", "    four", "  ~~~", "## Two (2)",
    ])  # fmt: skip
    assert blocks(page) == [
        Block(3, "sh", "echo [no](no.md)", None),
        Block(7, "python", "pass", "five minutes"),
        Block(11, "text", "three\n  four", None),
    ]
    assert links(page) == ["x.md#y", "p.png", "q.png"]
    assert anchors(page) == {"a-page-here", "two-2"}
    with pytest.raises(AssertionError, match="line 1 is never closed"):
        blocks("```sh\necho")
    assert NOT_RUN.search("<!-- not run: -->") is None  # a reason is the point
