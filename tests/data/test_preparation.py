"""`prepare`: one result whoever writes it and whatever interrupts it, or a sentence."""

import errno
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_texts import bpe_json

from openxlstm.data import plan as plans
from openxlstm.data import preparation
from openxlstm.data.cluster import Slurm
from openxlstm.data.corpus import SPLITS, read_corpus, split_of
from openxlstm.data.plan import Plan, Settings
from openxlstm.data.preparation import prepare
from openxlstm.data.prepare import open_source
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder

SHARES = Settings(shares=(80.0, 10.0, 10.0))
WITH = importlib.util.find_spec("datatrove") is not None
needs_datatrove = pytest.mark.skipif(not WITH, reason="datatrove is not installed")


@pytest.fixture(params=["datatrove", "plain"])
def writer(request, monkeypatch):
    """Both ways of writing."""
    if request.param == "datatrove":
        pytest.importorskip("datatrove")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return request.param


@pytest.fixture
def texts(tmp_path):
    """Texts of every kind that a machine without extras can read, two empty ones and one that is none."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(f"text {number} é <|endoftext|>\n" * (number % 7 + 1))
    records = "".join(json.dumps({"text": f"record {number} 世界"}) + "\n" for number in range(60))
    (folder / "more/a.jsonl").write_text(records + '{"text": ""}\n')
    (folder / "more/b.jsonl.gz").write_bytes(gzip.compress(records.replace("record", "packed").encode()))
    (folder / "more/empty.txt").touch()
    (folder / "more/picture.png").write_bytes(b"\x89PNG\0")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Every byte that says what the data is; meta.json without who made it."""
    found = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    for name in [name for name in found if name.endswith("meta.json")]:
        found[name] = json.dumps(json.loads(found[name]) | {"made_by": None}).encode()
    return found


@pytest.mark.parametrize("kind", ["byte", "bpe", "nfc", "wide"])
@needs_datatrove
def test_datatrove_and_the_plain_writer_give_identical_bytes(tmp_path, texts, monkeypatch, kind):
    """Text of the end token, a tokenizer that changes texts, and ids beyond 65,535 with gaps before them, included."""
    wide = json.loads(bpe_json())
    wide["model"]["vocab"]["returnreturn"] = 70_000
    made = {"byte": Tokenizer.bytes, "bpe": lambda: Tokenizer.from_json(bpe_json())}
    made |= {"nfc": lambda: Tokenizer.from_json(bpe_json(normalizer="NFC"))}
    made |= {"wide": lambda: Tokenizer.from_json(json.dumps(wide))}
    (texts / "decomposed.txt").write_text("cafe\u0301")  # NFC makes 2 bytes of 3
    first = prepare([texts], tmp_path / "one", made[kind](), SHARES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    second = prepare([texts], tmp_path / "two", made[kind](), SHARES)
    assert first == second
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert first is not None
    assert first["left_out"] == {"empty": 2, "not_text": 1}
    levels = [TokenFolder.open(tmp_path / "one" / split).byte_level for split in SPLITS]
    assert all(levels) is (kind != "nfc")


def test_every_document_is_in_its_split_in_order(tmp_path, texts, writer, byte):
    manifest = prepare([texts], tmp_path / "out", byte, SHARES)
    assert manifest is not None
    documents = read_corpus(texts).documents
    for split in SPLITS:
        folder = TokenFolder.open(tmp_path / "out" / split)
        wanted = [each.text for each in documents if split_of(each.name, SHARES.shares) == split]
        assert [each.decode() for each in folder.texts()] == wanted
        folder.verify()
        assert manifest["splits"][split]["fingerprint"] == folder.fingerprint
        made_by = json.loads((tmp_path / "out" / split / "meta.json").read_text())["made_by"]
        assert made_by["writer"] == writer
    assert sum(each["documents"] for each in manifest["splits"].values()) == len(documents) == 180
    assert set(open_source(tmp_path / "out", byte, tmp_path / "cache")) == set(SPLITS)
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]


@needs_datatrove
def test_parquet_and_zstandard_through_the_pipeline(tmp_path, byte):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    rows = [f"row {number}\n" for number in range(50)]
    parquet.write_table(arrow.table({"body": rows}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"body": row.replace("row", "line")}) + "\n" for row in rows)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    settings = Settings(shares=(100.0, 0.0, 0.0), text_key="body")
    prepare([tmp_path / "a.parquet", tmp_path / "b.jsonl.zst"], tmp_path / "out", byte, settings)
    read = [each.decode() for each in TokenFolder.open(tmp_path / "out/train").texts()]
    assert read == rows + [row.replace("row", "line") for row in rows]
    assert not (tmp_path / "out/valid").exists()


@needs_datatrove
@pytest.mark.slow
def test_tasks_follow_from_the_texts_and_not_from_the_workers(tmp_path, texts, byte, monkeypatch):
    monkeypatch.setattr(plans, "TASK_BYTES", 1500)
    for workers in (1, 2):
        prepare([texts], tmp_path / f"{workers}", byte, SHARES, workers=workers)
    one, two = (contents(tmp_path / name) for name in "12")
    assert one == two
    several = TokenFolder.open(tmp_path / "1/train")
    assert len(several.shards) > 2
    monkeypatch.undo()
    prepare([texts], tmp_path / "single", byte, SHARES)
    assert list(several.texts()) == list(TokenFolder.open(tmp_path / "single/train").texts())


def test_the_same_call_again_writes_nothing_and_another_is_refused(tmp_path, texts, writer, byte, bpe):
    out = tmp_path / "out"
    first = prepare([texts], out, byte, SHARES)
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert prepare([texts], out, byte, SHARES) == first
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == times
    for tokenizer, settings in ((bpe, SHARES), (byte, Settings())):
        with pytest.raises(ValueError, match="out exists and is not what this would make; give another --out"):
            prepare([texts], out, tokenizer, settings)
    (texts / "new.txt").write_text("new")
    with pytest.raises(ValueError, match="exists and is not what this would make"):
        prepare([texts], out, byte, SHARES)


@needs_datatrove
def test_tasks_that_are_complete_are_not_run_again(tmp_path, texts, byte, monkeypatch):
    """A task that fails, or is interrupted, leaves the others; the same call ends the work with the same bytes."""
    from openxlstm.data import pipeline

    monkeypatch.setattr(plans, "TASK_BYTES", 1500)
    prepare([texts], tmp_path / "whole", byte, SHARES, workers=1)
    ran: list[tuple[str, int]] = []
    run = pipeline.Tokenize.run

    def interrupted(step, data, rank=0, world_size=1):
        ran.append((step.split, rank))
        if len(ran) == 5:
            next(data)
            raise KeyboardInterrupt
        run(step, data, rank, world_size)

    monkeypatch.setattr(pipeline.Tokenize, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], tmp_path / "out", byte, SHARES, workers=1)
    assert not (tmp_path / "out").exists()
    prepare([texts], tmp_path / "out", byte, SHARES, workers=1)
    assert len(ran) == len(set(ran)) + 1  # only the interrupted one twice
    assert ran[4] == ran[5]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@needs_datatrove
@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(tmp_path, texts, byte):
    """SIGKILL in the middle of a task: what it had written is written again, what was complete is not."""
    program = """if True:
        import os, signal, sys
        from openxlstm.data import pipeline, plan
        from openxlstm.data.preparation import prepare
        from openxlstm.data.tokenizer import Tokenizer
        plan.TASK_BYTES, ran, read = 1500, [], pipeline.Read.run
        def killed(step, data=None, rank=0, world_size=1):
            for number, one in enumerate(read(step, data, rank, world_size)):
                if (step.split, rank, number) == ("train", 2, 3) and sys.argv[3] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                yield one
        pipeline.Read.run = killed
        settings = plan.Settings(shares=(80.0, 10.0, 10.0))
        prepare([sys.argv[1]], sys.argv[2], Tokenizer.bytes(), settings, workers=1)
    """
    call = [sys.executable, "-c", program, str(texts), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    first = subprocess.run([*call, "kill"], cwd=root, timeout=60)
    assert first.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob(".out.unfinished/logs/train/completions/*")) == ["00000", "00001"]
    assert not (tmp_path / "out").exists()
    subprocess.run([*call, "go on"], cwd=root, check=True, timeout=60)
    for split in SPLITS:
        TokenFolder.open(tmp_path / "out" / split).verify()
    wanted = [each.text for each in read_corpus(texts).documents if split_of(each.name, SHARES.shares) == "train"]
    assert [each.decode() for each in TokenFolder.open(tmp_path / "out/train").texts()] == wanted


@needs_datatrove
@pytest.mark.slow
def test_a_killed_worker_is_missed_and_named(tmp_path, texts, byte, monkeypatch):
    """multiprocessing's pool, which datatrove uses, waits for it for ever."""
    from openxlstm.data import pipeline

    monkeypatch.setattr(plans, "TASK_BYTES", 1500)
    monkeypatch.setattr(pipeline, "_begin_worker", _die)
    with pytest.raises(ValueError, match="a worker was killed, most likely for lack of memory; the same command"):
        prepare([texts], tmp_path / "out", byte, SHARES, workers=2)
    monkeypatch.undo()
    monkeypatch.setattr(plans, "TASK_BYTES", 1500)
    prepare([texts], tmp_path / "out", byte, SHARES, workers=1)
    TokenFolder.open(tmp_path / "out/train").verify()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_preparation_of_something_else_is_not_gone_on_with(tmp_path, texts, writer, byte, bpe, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], tmp_path / "out", byte, SHARES)
    for arguments, difference in (
        ((bpe, SHARES), "the tokenizer is another"),
        ((byte, Settings()), r"the settings were Settings\(shares=\(80.0"),
    ):
        with pytest.raises(ValueError, match=rf".out.unfinished holds a preparation .*, and {difference}.*; delete it"):
            prepare([texts], tmp_path / "out", *arguments)
    time.sleep(0.01)
    (texts / "05.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"and the files have changed \(05.txt\); delete it to begin anew"):
        prepare([texts], tmp_path / "out", byte, SHARES)
    shutil.rmtree(tmp_path / ".out.unfinished")
    monkeypatch.undo()
    assert prepare([texts], tmp_path / "out", byte, SHARES) is not None


def test_a_full_disk_is_a_sentence_and_can_be_gone_on_with(tmp_path, texts, byte, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparation, "_plainly" if not WITH else "_with_datatrove", full)
    with pytest.raises(ValueError, match=r"the disk of .* is full; make room, and the same command goes on from here"):
        prepare([texts], tmp_path / "out", byte, SHARES)
    monkeypatch.undo()
    assert prepare([texts], tmp_path / "out", byte, SHARES) is not None


@needs_datatrove
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_fills_while_a_task_writes_is_noticed(tmp_path, texts, byte):
    shard = tmp_path / ".out.unfinished/made/train/00000_unshuffled.ds"
    shard.parent.mkdir(parents=True)
    shard.symlink_to("/dev/full")
    with pytest.raises(ValueError, match="is full; make room"):
        prepare([texts], tmp_path / "out", byte, SHARES)
    shard.unlink()
    assert prepare([texts], tmp_path / "out", byte, SHARES) is not None


def test_two_commands_do_not_write_one_folder(tmp_path, texts, byte):
    pytest.importorskip("fcntl")
    with (
        preparation._only_one(tmp_path / ".out.unfinished", tmp_path / "out"),
        pytest.raises(ValueError, match="another command prepares .*out right now"),
    ):
        prepare([texts], tmp_path / "out", byte, SHARES)


def test_bin_files_are_copied_into_the_layout(tmp_path, byte):
    raw = b"".join(bytes([letter, 0]) for letter in b"one") + (256).to_bytes(2, "little") + b"t\0w\0o\0"
    (tmp_path / "train.bin").write_bytes(raw)
    (tmp_path / "val.bin").write_bytes(raw[:8])
    manifest = prepare([tmp_path], tmp_path / "out", byte, SHARES)
    assert manifest is not None
    assert manifest["splits"]["train"]["documents"] == 2
    assert list(TokenFolder.open(tmp_path / "out/train").texts()) == [b"one", b"two"]
    assert list(TokenFolder.open(tmp_path / "out/valid").texts()) == [b"one"]
    with pytest.raises(ValueError, match="out exists; give another --out"):
        prepare([tmp_path], tmp_path / "out", byte, SHARES)


def test_what_cannot_be_prepared_is_refused_before_anything_is_written(tmp_path, texts, writer, byte):
    endless = Tokenizer.from_json(byte.json.replace("<|endoftext|>", "<|other|>"))
    for sources, tokenizer, options, complaint in (
        ([tmp_path / "nowhere"], byte, {}, "there is no folder or file .*nowhere"),
        ([texts], endless, {}, "has no token to end a document with"),
        ([texts], byte, {"workers": 0}, "workers=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            prepare(sources, tmp_path / "out", tokenizer, SHARES, **options)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: there is no file to read; hidden ones do not count"):
        prepare([tmp_path / "none"], tmp_path / "out", byte, SHARES)
    prepare([texts], tmp_path / "made", byte, SHARES)
    for folder in ("made", "made/train"):
        with pytest.raises(ValueError, match="holds tokens already, not texts"):
            prepare([tmp_path / folder], tmp_path / "out", byte, SHARES)
    with pytest.raises(ValueError, match=r"texts holds 00.txt, which is to be read; give another --out"):
        prepare([texts], texts, byte, SHARES)
    assert sorted(os.listdir(tmp_path)) == ["made", "none", "texts"]


def test_a_damaged_record_stops_with_file_and_line(tmp_path, texts, writer, byte):
    with open(texts / "more/a.jsonl", "a") as stream:
        stream.write("{not json\n")
    with pytest.raises(ValueError, match=r"more/a.jsonl:62 is not JSON"):
        prepare([texts], tmp_path / "out", byte, SHARES)
    assert not (tmp_path / "out").exists()


def test_no_document_in_train_is_a_sentence(tmp_path, writer, byte):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no document falls into train: none at all \(1 empty, 0 not UTF-8"):
        prepare([tmp_path / "empty.txt"], tmp_path / "out", byte, SHARES)


def test_without_datatrove_what_is_large_or_for_a_cluster_needs_it(tmp_path, texts, byte, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a cluster is used through datatrove: pip install 'openxlstm\[data\]'"):
        prepare([texts], tmp_path / "out", byte, SHARES, cluster="ray")
    monkeypatch.setattr(preparation, "MOST_PLAIN", 1000)
    with pytest.raises(ValueError, match=r"GB are too much without datatrove .*: pip install 'openxlstm\[data\]'"):
        prepare([texts], tmp_path / "out", byte, SHARES)


@pytest.mark.parametrize(
    ("shares", "complaint"),
    [
        ((98.0, 1.0, 2.0), "split 98/1/2 must be three shares of 100"),
        ((0.0, 50.0, 50.0), "the first above 0"),
        ((110.0, -5.0, -5.0), "must be three shares of 100"),
        ((99.999, 0.0005, 0.0005), "two decimals at most"),
    ],
)
def test_shares_that_are_none_are_refused(shares, complaint):
    with pytest.raises(ValueError, match=complaint):
        Settings(shares=shares)


def test_tasks_are_runs_of_files_that_cover_all_of_them_once():
    for sizes in ([1] * 10, [0, 0, 0], [100, 1, 1, 1], [1, 1, 1, 100], [5], [0, 5, 0], [3, 0, 0, 9, 2, 7, 0]):
        for wanted in (1, 2, 3, 7, 50):
            runs = plans._cut(sizes, wanted)
            assert [index for first, end in runs for index in range(first, end)] == list(range(len(sizes)))
            assert len(runs) <= wanted + 1
            assert all(first < end for first, end in runs)


def test_a_plan_reads_what_it_wrote(texts, byte):
    plan = Plan.of([texts, "stdlib"], byte, Settings(delimiter="blank"), 4)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.sha256 == plan.sha256
    assert plan.differs(again) is None
    assert len(plan.tasks) in (4, 5)
    assert plan.differs(Plan.of([texts, "stdlib"], byte, Settings(delimiter="blank"), 2)) == f"there were {2} tasks"
    other_order = Plan.of(["stdlib", texts], byte, Settings(delimiter="blank"), 4)
    assert plan.differs(other_order) == "the order is another"


@needs_datatrove
def test_slurm_gets_what_the_file_says_and_the_same_call_ends_it(tmp_path, texts, byte, monkeypatch):
    """No sbatch here: its scripts are caught, and the tasks run as the array would run them."""
    from datatrove.executor import slurm

    scripts: list[str] = []

    def sbatch(script, job_id_retriever, *args):
        scripts.append(script)
        return str(100 + len(scripts))

    monkeypatch.setattr(slurm, "launch_slurm_job", sbatch)
    file = tmp_path / "slurm.toml"
    file.write_text(
        'time = "01:00:00"\npartition = "cpu"\nmem_per_cpu_gb = 3\nworkers = 7\ntasks = 4\ntasks_per_job = 2\n'
        'env_command = "source /shared/venv/bin/activate"\nsbatch = { account = "lab" }\n'
    )
    cluster = Slurm.read(file)
    assert prepare([texts], tmp_path / "out", byte, SHARES, cluster=cluster) is None
    assert not (tmp_path / "out").exists()
    jobs = [script for script in scripts if "launch_pickled_pipeline" in script]
    tasks = len(json.loads((tmp_path / ".out.unfinished/plan.json").read_text())["tasks"])
    assert len(jobs) == 3
    for job, split in zip(jobs, SPLITS):
        lines = job.splitlines()
        assert f"#SBATCH --array=0-{(tasks + 1) // 2 - 1}%7" in lines
        for wanted in (
            "--time=01:00:00", "--partition=cpu", "--mem-per-cpu=3G", "--cpus-per-task=1", "--account=lab",
            f"--job-name=prepare-{split}",
        ):  # fmt: skip
            assert f"#SBATCH {wanted}" in lines
        assert "source /shared/venv/bin/activate" in lines
        assert f"logs/{split}/executor.pik" in job

    import dill

    monkeypatch.setattr(slurm, "expand_slurm_nodelist", lambda nodes: [nodes])
    monkeypatch.setenv("SLURM_NODELIST", "here")
    monkeypatch.setenv("RUN_OFFSET", "0")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for split in SPLITS:
        for job in range((tasks + 1) // 2):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
            with open(tmp_path / f".out.unfinished/logs/{split}/executor.pik", "rb") as stream:
                dill.load(stream).run()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    manifest = prepare([texts], tmp_path / "out", byte, SHARES, cluster=cluster)
    assert manifest is not None
    prepare([texts], tmp_path / "single", byte, SHARES)
    for split in SPLITS:
        one, other = (TokenFolder.open(tmp_path / name / split) for name in ("out", "single"))
        assert list(one.texts()) == list(other.texts())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('partition = "cpu"', 'slurm.toml does not say time, as time = "04:00:00"'),
        ('time = "1"', 'does not say partition, as partition = "cpu"'),
        ('time = "1"\npartition = "cpu"\nmem_per_cpu = 2', "has no field 'mem_per_cpu'; did you mean 'mem_per_cpu_gb'"),
        ('time = "1"\npartition = "cpu"\nworkers = "2"', "workers = '2' must be of type"),
        ('time = "1"\npartition = "cpu"\nworkers = true', "workers = True must be of type"),
        ('time = "1"\npartition = "cpu"\nsbatch = { a = 1 }', r"sbatch = {'a': 1} must be of type"),
        ("time", "slurm.toml is not TOML"),
    ],
)
def test_a_slurm_file_is_read_strictly(tmp_path, text, complaint):
    (tmp_path / "slurm.toml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        Slurm.read(tmp_path / "slurm.toml")
