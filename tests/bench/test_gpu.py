"""`make gpu` without a GPU: its code runs at tiny shapes under Triton's interpreter, and what it writes is judged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from openxlstm import kernels
from openxlstm.bench import page
from openxlstm.bench.gpu import parity, peers, stage
from openxlstm.bench.gpu.__main__ import main
from openxlstm.bench.gpu.device import Setting
from openxlstm.bench.gpu.report import NEEDS, Report
from openxlstm.kernels import dispatch

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def finding(kind: str, **facts) -> dict:
    return {"kind": kind, **facts}


def equal(op: str, *, green: bool = True) -> dict:
    error = 1e-6 if green else 1.0
    return finding("parity", op=op, case=f"{op}, K 5", error=error, limit=1e-4, worst="dq at T 2", green=green)


ROW = {
    "case": "a case", "side": "openxlstm", "error": 1e-6, "median_ms": 2.0, "fastest_ms": 1.5, "slowest_ms": 2.5,
    "its_over_ours": 1.0, "rate": 120.0, "unit": "GB/s", "of_ceiling": 0.8,
}  # fmt: skip
FACTS = {"device": "a device", "versions": {"torch": "2"}, "peers": {}, "command": "make gpu", "date": "2026-01-01"}


def test_without_a_gpu_one_sentence_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1
    assert done.output.strip().splitlines() == [
        f"Error: No GPU is here: torch {torch.__version__} finds no CUDA device, so nothing was run."
    ]
    done = CliRunner().invoke(main, ["--device", "cpu", "--write", "page.md"])
    assert done.exit_code == 2
    assert "an interpreter on a CPU gives none" in done.output


def test_no_figure_while_parity_is_red_or_unknown(tmp_path: Path) -> None:
    report = Report({**FACTS, "figures": True}, tmp_path / "found.json")
    assert set(NEEDS) | {"parity"} == set(stage.STAGES)
    assert "no configuration of mlstm was compared" in str(report.refuses("mlstm"))
    report.add(equal("mlstm"))
    assert report.refuses("mlstm") is None
    assert "mlstm_step" in str(report.refuses("decode"))
    assert report.green
    report.add(equal("mlstm_step", green=False))
    assert "1 configurations of mlstm_step are not equal" in str(report.refuses("step"))
    assert report.refuses("mlstm") is None
    assert not report.green
    report.add(finding("failed", case="mlstm, K 5, V 7", reason="CompilationError"))
    assert report.refuses("mlstm") is not None


def test_what_was_found_is_on_disk_and_on_its_part_of_the_page(tmp_path: Path) -> None:
    report = Report({**FACTS, "figures": True}, tmp_path / "runs" / "found.json")
    report.add(equal("slstm"))
    report.add(finding("row", suite="step", row=ROW))
    report.add(finding("missing", peer="a peer", reason="ModuleNotFoundError: no module"))
    report.add(finding("left", case="a later case", reason="3 s were left"))
    report.add(finding("curve", model="xLSTM", steps=50, apart=0.01, limit=0.02, green=True, shown=[[0, 5.5, 5.4]]))
    report.add(finding("fact", compilations="0 for 28 new lengths"))
    assert json.loads(report.file.read_text())["found"] == report.found
    text = report.markdown()
    for said in (
        "| openxlstm | 2.00 (1.50 to 2.50) | 1.00 | 1e-06 | 120 GB/s | 80 % |", "1 of 1 configurations",
        "- Device: a device", "- Not compared: a peer: ModuleNotFoundError", "- Not run: a later case",
        "step 1: 5.500 / 5.400", "1.00 % apart", "0 for 28 new lengths",
    ):  # fmt: skip
        assert said in text
    report.facts["figures"] = False
    assert "2.00" not in report.markdown()
    file = tmp_path / "performance.md"
    page.replace(file, "gpu", text)
    page.replace(file, "cpu", "## On a CPU\n\nthe CPU's numbers\n")
    both = file.read_text()
    assert both.index("the CPU's numbers") < both.index("a device")
    page.replace(file, "gpu", text.replace("a device", "another"))
    assert file.read_text() == both.replace("a device", "another")
    page.replace(file, "cpu", "## On a CPU\n\nnew numbers\n")
    assert file.read_text() == both.replace("a device", "another").replace("the CPU's numbers", "new numbers")
    file.write_text(both.replace("<!-- gpu: end -->", ""))
    with pytest.raises(ValueError, match="marks of the part 'gpu'"):
        page.replace(file, "cpu", "new")
    file.write_text("# Notes\n")
    with pytest.raises(ValueError, match="does not begin with"):
        page.replace(file, "gpu", text)
    assert file.read_text() == "# Notes\n"


def test_the_page_of_this_repository_can_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    file.write_text((ROOT / "docs" / "performance.md").read_text())
    page.replace(file, "gpu", "## On a GPU\n")
    assert "### Decoding, a token at a time" in file.read_text()


def test_every_choice_of_a_launch_is_among_the_cases() -> None:
    cases = parity.cases(small=False)
    assert len(set(cases)) == len(cases)
    mlstm = [one for one in cases if one.op == "mlstm"]
    assert {(one.K, one.V) for one in cases[:4]} == set(parity.TIMED)
    for dtype in parity.DTYPES:
        mine = [one for one in mlstm if one.dtype == dtype]
        assert {one.input_gate for one in mine} == set(parity.GATES)
        assert {one.flags for one in mine} == {True, False}
        assert any(one.lengths == parity.LENGTHS for one in mine)
        widest = 32 if dtype == torch.float32 else 64
        tiles = {(min(one.K, widest), min(one.V, widest), one.chunk) for one in mine if one.chunk}
        assert len(tiles) == 3 * (4 if dtype == torch.float32 else 9)
        assert {one.K for one in cases if one.op == "slstm" and one.dtype == dtype} >= {16, 64, 65, 128, 192, 256, 512}


def test_a_case_that_fails_or_has_no_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ValueError("two\nlines")

    stage.case(Setting("cpu", 0.0), "a", 1.0, fails)
    stage.case(Setting("cuda", 0.0), "b", 1.0, fails)
    assert peers.guarded("c", fails) is None
    wrong = torch.ones(2)
    assert peers.guarded("d", lambda: (lambda: wrong, []), lambda h: 0.5) is None
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["kind"] for one in said] == ["failed", "left", "missing", "missing"]
    assert said[0]["reason"] == "ValueError: two lines"
    assert "its h is 5.0e-01 from ours" in said[3]["reason"]


def test_trust_lets_auto_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRUSTED", set())
    call = dispatch.Call("mlstm", "cuda", torch.bfloat16, 64, 128, needs_grad=True)
    triton = dispatch.BACKENDS[0]
    willing = dispatch.Backend(triton.name, triton.module, lambda call: None, triton.about, triton.on_request)
    monkeypatch.setattr(dispatch, "BACKENDS", (willing, *dispatch.BACKENDS[1:]))
    assert dispatch.resolve(call) is not triton.module
    kernels.trust("triton")
    assert dispatch.resolve(call) is triton.module
    assert "serves" in kernels.explain("cuda").splitlines()[1]
    with pytest.raises(ValueError, match="'tritn' does not exist"):
        kernels.trust("tritn")


@needs_triton
@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    """The parity and one stage behind it, in processes of their own; the interpreter stands for the device."""
    out = tmp_path / "found.json"
    command = ["-m", "openxlstm.bench.gpu", "--device", "cpu", "--only", "step", "--workers", "1", "--out", str(out)]
    done = run(*command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["found"]
    assert [one["green"] for one in found if one["kind"] == "parity"] == [True] * 4
    assert "2 of 2 configurations" in done.stdout
    assert "- Ran, without a clock: mLSTM step, B 2" in done.stdout
    assert " ms" not in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["slstm", "train", "decode", "compilations", "curve", "mlstm"])
def test_a_stage_runs(name: str) -> None:
    """All sides that can be had, in the interpreter; times mean nothing and are not looked at."""
    done = run("-m", "openxlstm.bench.gpu.stage", name, "cpu", "600", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    assert found[-1] == {"kind": "fact", "done": name}
    assert not [one for one in found if one["kind"] == "failed"]
    if name == "compilations":
        assert found[0]["compilations"] == "not counted, the kernels are interpreted"
    elif name == "curve":
        assert [one["green"] for one in found if one["kind"] == "curve"] == [True, True]
    else:
        assert "openxlstm" in {one["row"]["side"] for one in found if one["kind"] == "row"}


def test_the_gpu_machine_needs_only_what_the_core_imports() -> None:
    """Every module of the command is imported with all optional packages hidden."""
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN: raise ModuleNotFoundError(f"No module named {name!r}")
HIDDEN = {"transformers", "gguf", "yaml", "matplotlib", "xlstm", "mlstm_kernels", "einops", "datatrove", "pyarrow",
          "beartype", "accelerate", "peft", "trl", "lm_eval", "tensorboard", "fla", "flashrnn", "dacite"}
sys.meta_path.insert(0, Hidden())
from openxlstm.bench.gpu import __main__, device, kernels, models, parity, peers, report, stage
said = peers.versions()
assert said["transformers"].startswith("not compared: ModuleNotFoundError"), said
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
