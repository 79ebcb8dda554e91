"""The datatrove pipeline: Read -> CountBytes -> Tokenize, for any number of tasks, on one machine, Slurm or Ray.

Only this file imports datatrove (0.10.1). A split is a run of its own, with the same tasks; a task writes one shard
and facts/SPLIT/RRRRR.json, what reading that shard again has shown. datatrove marks finished tasks in
logs/SPLIT/completions, so a task that was killed is run again and nothing else is; `collect` then makes token folders.

Where datatrove would do something else without a word:
  its JSONL reader drops what is damaged                    Read stops at it, with file and line (records.py)
  the text <|endoftext|> in a document ends it              Tokenize encodes through our Tokenizer
  a vocabulary with gaps gets too few bytes per id          Tokenize counts ids from the largest
  a pool waits for ever for a worker that was killed        Local notices and says so
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, final

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens import DocumentTokenizer

from openxlstm.data import foreign
from openxlstm.data.cluster import Slurm
from openxlstm.data.corpus import split_of
from openxlstm.data.plan import Plan
from openxlstm.data.records import LeftOut, documents
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import seal, write_atomically
from openxlstm.data.workers import pool

_BATCH = 512  # documents encoded at once


@final
class Read(PipelineStep):
    """The documents of one split in the files of a task."""

    name = "texts and records"
    type = "READER"

    def __init__(self, work: Path, split: str) -> None:
        super().__init__()
        self.work, self.split = work, split
        self.left_out = LeftOut()

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents in the order of the plan."""
        self.left_out = LeftOut()  # a process may run one task after another
        plan = Plan.from_json((self.work / "plan.json").read_text())
        first, end = plan.tasks[rank]
        for file in plan.files[first:end]:
            for one in documents(file.path, file.name, plan.settings.text_key, file.delimiter, self.left_out):
                if split_of(one.name, plan.settings.shares) == self.split:
                    yield Document(text=one.text, id=one.name)


@final
class CountBytes(PipelineStep):
    """Passes documents on and counts their UTF-8 bytes: datatrove's own doc_len counts characters."""

    name = "UTF-8 bytes"
    type = "COUNTER"

    def __init__(self) -> None:
        super().__init__()
        self.documents = self.bytes = self.lengths = 0

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The same documents."""
        self.documents = self.bytes = self.lengths = 0  # a process may run one task after another
        for one in data:
            length = len(one.text.encode())
            self.documents += 1
            self.bytes += length
            self.lengths = (self.lengths + foreign.mix_lengths(np.array([length]))) % (1 << 64)
            yield one


class Tokenize(DocumentTokenizer):
    """datatrove's writer, in the order of the documents, with our Tokenizer; then reads what it wrote and notes it."""

    def __init__(self, work: Path, split: str, read: Read, count: CountBytes) -> None:
        super().__init__(
            str(work / "made" / split),
            str(work / "tokenizer.json"),
            batch_size=_BATCH,
            shuffle_documents=False,  # the order of training is put on top (order.py)
        )
        self.facts, self.split, self.read, self.count = work / "facts" / split, split, read, count

    @cached_property
    def exact(self) -> Tokenizer:
        """The tokenizer, as everywhere else in this library."""
        return Tokenizer.from_file(self.tokenizer_name_or_path)

    @cached_property
    def tokenizer(self) -> Any:
        """What datatrove asks of a tokenizer: `encode_batch`, with the end token."""
        end = foreign.end_id_of(self.exact)
        return SimpleNamespace(
            encode_batch=lambda texts: [SimpleNamespace(ids=[*ids, end]) for ids in self.exact.encode_batch(texts)]
        )

    @cached_property
    def token_size(self) -> int:
        """Bytes per id."""
        return 2 if self.exact.vocab_size <= 1 << 16 else 4

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the shard of a task and its facts."""
        super().run(data, rank, world_size)
        facts: dict[str, Any] = {"empty": self.read.left_out.empty, "not_text": self.read.left_out.not_text}
        if self.count.documents:
            file = Path(self.output_folder.path) / f"{rank:05d}_unshuffled.ds"
            seen = foreign.examine(file, self.exact, self.token_size, text_bytes=self.count.bytes)
            if seen.unended or seen.line["documents"] != self.count.documents:
                raise ValueError(
                    f"{file} has {seen.line['documents']} documents, {seen.unended} of them without end token; "
                    f"{self.count.documents} were read"
                )
            facts |= {"line": seen.line, "byte_level": self.exact.byte_level and seen.lengths == self.count.lengths}
        self.facts.mkdir(parents=True, exist_ok=True)
        write_atomically(self.facts / f"{rank:05d}.json", json.dumps(facts))


def steps(work: Path, split: str) -> list[PipelineStep]:
    """The pipeline of one split."""
    read, count = Read(work, split), CountBytes()
    return [read, count, Tokenize(work, split, read, count)]


class Local(LocalPipelineExecutor):
    """datatrove's local executor; quiet, for each task has a log of its own; and workers that are killed are missed."""

    def run(self) -> None:
        """Run the tasks that are not complete.

        Raises:
            ValueError: a worker was killed, or a task could not read its texts.
        """
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) < 2:
            for rank in ranks:
                self.run_task(rank)
            return
        try:
            with pool(self.workers, "forkserver", _begin_worker) as executor:
                for future in as_completed([executor.submit(self.run_task, rank) for rank in ranks]):
                    future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker was killed, most likely for lack of memory; the same command goes on, and fewer "
                "--workers need less"
            ) from None

    def run_task(self, rank: int) -> None:
        """One task. What datatrove says on the way is in its log too."""
        with redirect_stderr(io.StringIO()):
            self._run_for_rank(rank)


def run(work: Path, split: str, tasks: int, workers: int, cluster: Slurm | Literal["ray"] | None) -> bool:
    """Run the tasks of one split that are not complete, here or on a cluster; whether all of them are, now.

    Raises:
        ValueError: a task could not read its texts, or ended for another reason.
    """
    pipeline, logs = steps(work, split), str(work / "logs" / split)
    executor: PipelineExecutor
    if cluster is None:
        executor = Local(pipeline, tasks=tasks, workers=workers, logging_dir=logs)
    elif isinstance(cluster, Slurm):
        executor = SlurmPipelineExecutor(
            pipeline, tasks=tasks, job_name=f"prepare-{split}", logging_dir=logs, **cluster.to_datatrove()
        )
    else:
        executor = RayPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs)
    if executor.get_incomplete_ranks():
        executor.run()
    missing = executor.get_incomplete_ranks()
    if missing and not isinstance(cluster, Slurm):
        log = work / "logs" / split / "logs" / f"task_{missing[0]:05d}.log"
        raise ValueError(f"{len(missing)} of {tasks} tasks did not finish; why, is in {log}. The same command goes on")
    return not missing


def collect(work: Path, split: str, tasks: int, tokenizer: Tokenizer, made_by: dict[str, Any]) -> None:
    """Make a token folder of the shards of all tasks, or none if there is no document. May be interrupted and repeated.

    Shards are called as the plain writer calls them, 000_SPLIT.ds: one task gives its bytes, fingerprint included.
    """
    folder, byte_level = work / "made" / split, True
    lines: list[dict[str, Any]] = []
    for rank in range(tasks):
        facts = json.loads((work / "facts" / split / f"{rank:05d}.json").read_text())
        file = folder / f"{rank:05d}_unshuffled.ds"
        Path(f"{file}.metadata").unlink(missing_ok=True)  # it names a tokenizer in a folder that will be gone
        name = f"{len(lines):03d}_{split}.ds"
        for suffix in ("", ".index"):
            if "line" not in facts:
                Path(f"{file}{suffix}").unlink(missing_ok=True)  # empty
            elif Path(f"{file}{suffix}").exists():
                os.replace(f"{file}{suffix}", folder / f"{name}{suffix}")
        if "line" in facts:
            lines.append(facts["line"] | {"file": name})
            byte_level &= facts["byte_level"]
    if not lines:
        shutil.rmtree(folder, ignore_errors=True)
        return
    token_size = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    seal(folder, lines, tokenizer, foreign.end_id_of(tokenizer), token_size, byte_level=byte_level, made_by=made_by)


def left_out(work: Path, tasks: int) -> LeftOut:
    """What all tasks together have left out. Each split reads all files, so one of them knows."""
    facts = [json.loads((work / "facts" / "train" / f"{rank:05d}.json").read_text()) for rank in range(tasks)]
    return LeftOut(sum(each["empty"] for each in facts), sum(each["not_text"] for each in facts))


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker per core already
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word of its own
