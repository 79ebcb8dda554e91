"""The journal survives what kills a run, and a display says what happens in both of its forms."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from openxlstm.train import log

LINE = {"step": 3, "loss": 1.25, "bits_per_byte": 1.8034, "tokens_per_second": 12345.6, "elapsed": 30.0}


def test_a_torn_last_line_is_left_out_and_cut_away(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.30000000000000004}\n{"step": 3, "lo')
    assert [line["step"] for line in log.read_journal(file)] == [1, 2]
    log.cut_journal(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.30000000000000004}\n'
    log.cut_journal(file, 1)
    journal = log.Journal(file)
    journal.write({"step": 2, "loss": 0.5})
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [0.1, 0.5], (
        "a line waits for nothing"
    )
    journal.close()


def test_nothing_is_glued_to_a_torn_line(tmp_path: Path) -> None:
    """events.jsonl is never cut back, so the journal itself takes away what a kill tore."""
    for torn, kept in (('{"step": 1}\n{"st', [1, 2]), ('{"st', [2]), ("", [2]), ('{"step": 1}\n', [1, 2])):
        file = tmp_path / "events.jsonl"
        file.write_text(torn)
        journal = log.Journal(file)
        journal.write({"step": 2})
        journal.close()
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == kept


def test_a_torn_line_in_the_middle_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: not JSON"):
        log.read_journal(file)


def test_a_run_that_has_not_begun_has_an_empty_journal(tmp_path: Path) -> None:
    log.cut_journal(tmp_path / "train.jsonl", 0)
    assert (tmp_path / "train.jsonl").read_text() == ""


def test_plain_lines_are_few_and_end_with_the_last_step() -> None:
    out = io.StringIO()
    shown = log.display(Console(file=out, width=200))
    for step in range(1, 101):
        shown.step(LINE | {"step": step, "elapsed": step / 2}, 100, 50.0 - step / 2)
    shown.note("done [with] brackets")
    shown.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert lines[0] == "step 1/100  loss 1.250  1.803 bits/byte  12,346 tokens/s  50s left"
    assert lines[-1] == "done [with] brackets"


def test_a_terminal_gets_moving_lines_and_sentences_that_stay() -> None:
    out = io.StringIO()
    shown = log.display(Console(file=out, width=120, force_terminal=True, color_system=None))
    shown.step(LINE, 100, 161.0)
    shown.note("step 3  validation 1.9000 bits/byte")
    shown.step(LINE | {"step": 4, "elapsed": 30.1, "loss": 7.77}, 100, 160.0)
    shown.close()
    shown.close()
    text = out.getvalue()
    assert "loss 1.250  1.803 bits/byte" in text
    assert "12,346 tokens/s" in text
    assert "2m41s left" in text
    assert "step 3  validation 1.9000 bits/byte" in text
    assert "7.770" not in text, "at most five times a second"
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text, "the cursor is given back"


def test_everything_the_meters_say_is_shown_and_nothing_else() -> None:
    full = LINE | {"mfu": 0.382, "lr": 4e-3, "grad_norm": 0.417, "data_wait": 0.03, "memory": {"resident": 3 * 2**30}}
    out = Console(file=io.StringIO(), width=100, record=True)
    out.print(log.picture(full, 6, 161.0, [3.0, 2.0, 1.5, 1.25]))
    lines = out.export_text().splitlines()
    assert lines[0].split()[:2] == ["step", "3/6"]
    assert lines[0].rstrip().endswith("50 %  2m41s left")
    assert lines[1].rstrip() == "loss 1.250  1.803 bits/byte  █▄▂▁"
    details = "12,346 tokens/s  38.2 % of the peak  rate 4.0e-03  norm 0.42  waits for data 3 %  3.0 GiB"
    assert lines[2].rstrip() == details
    out.print(log.picture(LINE, 6, 161.0, [1.25]))
    assert out.export_text().splitlines()[2].rstrip() == "12,346 tokens/s"


@pytest.mark.parametrize(
    ("values", "letters"),
    [([], ""), ([1.0], ""), ([2.0, 2.0], "▁▁"), ([0.0, 7.0], "▁█"), ([3.0, float("nan"), 1.0], "█▁")],
)
def test_the_course_of_a_number_in_letters(values: list[float], letters: str) -> None:
    assert log.curve(values) == letters
    assert len(log.curve([float(value) for value in range(1000)])) == log.CURVE


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3.0, "0s"), (47.4, "47s"), (59.7, "1m00s"), (161.0, "2m41s"), (11_100.0, "3h05m")]
)
def test_durations_for_people(seconds: float, words: str) -> None:
    assert log.clock(seconds) == words
