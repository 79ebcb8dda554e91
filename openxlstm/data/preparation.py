"""Texts become token folders under a name of the user's, at any size: `xlstm prepare`.

What is written where, and when it counts as done: plan.py. With datatrove (the extra `data`) its pipeline does the
work, in tasks, on as many cores as there are or on a cluster; without it a plain writer in this process does what fits
into memory. One task and the plain writer give the same bytes. Whatever interrupts it, the same call goes on.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from openxlstm.data import foreign
from openxlstm.data.cluster import Slurm
from openxlstm.data.corpus import SPLITS, split_of
from openxlstm.data.plan import Plan, Settings
from openxlstm.data.records import Document, LeftOut, documents
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, write_atomically, write_folder, write_tokens

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two commands on one folder are not refused
    fcntl = None  # type: ignore[assignment]

MANIFEST = "corpus.json"
MOST_PLAIN = 1 << 30  # bytes of files that the plain writer takes: it holds their texts in memory, some three times
Status = Callable[[str], None]


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    workers: int | None = None,
    cluster: Slurm | Literal["ray"] | None = None,
    token_size: int | None = None,
    status: Status = lambda text: None,
) -> dict[str, Any] | None:
    """Write `out`/train, `out`/valid and `out`/test, or find that they are there already.

    Args:
        sources: "stdlib", folders, files of texts or records; or one .bin file, or folder of them (foreign.py).
        workers: processes; by default one per core. The result does not depend on it.
        cluster: run the tasks there; Ray takes the cluster of RAY_ADDRESS, or makes one on this machine.
        token_size: bytes per id of .bin files that do not say it; otherwise the vocabulary decides.
        status: is told, about once a second, how far it is.

    Returns:
        What corpus.json says: per split documents, tokens, bytes, fingerprint; and what was left out. None if Slurm
        has the tasks: when they are done, the same call ends the preparation.

    Raises:
        ValueError: something is wrong with the texts, the settings or the machine, in a sentence.
    """
    out = Path(out)
    foreign.end_id_of(tokenizer)
    if len(sources) == 1 and (bins := foreign.bins_of(Path(sources[0]))):
        return _convert(bins, out, tokenizer, token_size)
    plan = Plan.of(sources, tokenizer, settings, cluster.tasks if isinstance(cluster, Slurm) else None)
    work = _work_of(out)
    for file in plan.files:
        if out.absolute() in file.path.absolute().parents:
            raise ValueError(f"{out} holds {file.name}, which is to be read; give another --out")
    if (out / MANIFEST).is_file():
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("plan") == plan.sha256:
            return manifest
    if out.exists():
        raise ValueError(f"{out} exists and is not what this would make; give another --out, or delete it")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    with _only_one(work, out):
        _begin(plan, work, tokenizer)
        if importlib.util.find_spec("datatrove") is not None:
            written = _with_datatrove(plan, work, tokenizer, workers or _cores(), cluster, status)
            if written is None:
                return None
        elif cluster is not None:
            raise ValueError("a cluster is used through datatrove: pip install 'openxlstm[data]'")
        else:
            written = _plainly(plan, work, tokenizer, status)
        said = {"sources": [str(source) for source in sources], "plan": plan.sha256}
        manifest = said | _manifest(work / "made", tokenizer, written)
        write_atomically(work / "made" / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        os.rename(work / "made", out)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _convert(bins: dict[str, list[Path]], out: Path, tokenizer: Tokenizer, token_size: int | None) -> dict[str, Any]:
    """Token files of others as token folders, in a copy: then nothing is read at each start, and nothing can change."""
    if out.exists():
        raise ValueError(f"{out} exists; give another --out, or delete it")
    work = _work_of(out)
    with _only_one(work, out):
        shutil.rmtree(work / "made", ignore_errors=True)
        for split, files in bins.items():
            folder = foreign.open_bins(files, tokenizer, token_size=token_size)
            write_folder(work / "made" / split, folder, name=split, made_by={"copied": ", ".join(map(str, files))})
        manifest = {"sources": [str(file) for files in bins.values() for file in files]}
        manifest |= _manifest(work / "made", tokenizer, LeftOut())
        write_atomically(work / "made" / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        os.rename(work / "made", out)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _begin(plan: Plan, work: Path, tokenizer: Tokenizer) -> None:
    """Write the plan down, or compare with the one that was begun."""
    if (work / "plan.json").is_file():
        begun = Plan.from_json((work / "plan.json").read_text(encoding="utf-8"))
        if (difference := plan.differs(begun)) is not None:
            raise ValueError(
                f"{work} holds a preparation that was not finished, and {difference}; delete it to begin anew"
            )
        return
    tokenizer.save(work / "tokenizer.json")
    write_atomically(work / "plan.json", plan.to_json())


def _with_datatrove(
    plan: Plan, work: Path, tokenizer: Tokenizer, workers: int, cluster: Slurm | Literal["ray"] | None, status: Status
) -> LeftOut | None:
    """All splits, one after the other; on Slurm, all at once and None until they are complete."""
    from openxlstm.data import pipeline

    tasks, complete = len(plan.tasks), True
    for split in SPLITS:
        with _watch(work, split, tasks, status):
            complete &= pipeline.run(work, split, tasks, min(workers, tasks), cluster)
    if not complete:
        return None
    for split in SPLITS:
        pipeline.collect(work, split, tasks, tokenizer, _made_by("datatrove"))
    return pipeline.left_out(work, tasks)


def _plainly(plan: Plan, work: Path, tokenizer: Tokenizer, status: Status) -> LeftOut:
    """The same without datatrove, from memory. It begins anew after an interruption: it has minutes of work at most."""
    if plan.total_bytes > MOST_PLAIN:
        raise ValueError(
            f"{plan.total_bytes / 1e9:.1f} GB are too much without datatrove ({MOST_PLAIN / 1e9:.1f} GB at most): "
            "pip install 'openxlstm[data]'"
        )
    left_out = LeftOut()
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for file in plan.files:
        for one in documents(file.path, file.name, plan.settings.text_key, file.delimiter, left_out):
            parts[split_of(one.name, plan.settings.shares)].append(one)
    shutil.rmtree(work / "made", ignore_errors=True)
    for split, part in parts.items():
        if part:

            def tell(done: int, total: int, split: str = split) -> None:
                status(f"{split}: {done:,} of {total:,} documents")

            write_tokens(work / "made" / split, part, tokenizer, name=split, made_by=_made_by("plain"), progress=tell)
    return left_out


def _manifest(made: Path, tokenizer: Tokenizer, left_out: LeftOut) -> dict[str, Any]:
    """The sizes of what was made; refused if there is nothing to train on."""
    sizes = {}
    for split in SPLITS:
        if (made / split).is_dir():
            folder = TokenFolder.open(made / split)
            sizes[split] = {
                "documents": folder.total_documents,
                "tokens": folder.total_tokens,
                "bytes": folder.total_bytes,
                "fingerprint": folder.fingerprint,
            }
    if "train" not in sizes:
        found = " and ".join(f"{size['documents']} in {split}" for split, size in sizes.items()) or "none at all"
        raise ValueError(
            f"no document falls into train: {found} ({left_out.empty} empty, {left_out.not_text} not UTF-8 text); "
            "--split 100/0/0 puts all there, --delimiter cuts long texts"
        )
    said = {"empty": left_out.empty, "not_text": left_out.not_text}
    return {"tokenizer": tokenizer.sha256, "left_out": said, "splits": sizes}


def _made_by(writer: str) -> dict[str, Any]:
    return {"writer": writer, "python": platform.python_version()}


def _work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _only_one(work: Path, out: Path) -> Iterator[None]:
    """Nobody else prepares the same; a full disk is a sentence."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another command prepares {out} right now; let it finish, or stop it") from None
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of {out.absolute().parent} is full; make room, and the same command goes on from here"
        ) from None


@contextmanager
def _watch(work: Path, split: str, tasks: int, status: Status) -> Iterator[None]:
    """Tell once a second how many tasks are complete and how many bytes of tokens lie there, from the files alone."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            done = len(list((work / "logs" / split / "completions").glob("*")))
            size = sum(file.stat().st_size for file in (work / "made" / split).glob("*.ds"))
            status(f"{split}: {done} of {tasks} tasks, {size / 1e6:,.0f} MB of tokens")

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
