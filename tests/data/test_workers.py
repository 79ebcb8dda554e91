"""Workers end with the one that started them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openxlstm.data.workers import pool

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROGRAM = """if True:
    import sys
    from openxlstm.data.workers import pool
    from tests_of_workers import busy, nothing
    if __name__ == "__main__":
        with pool(2, "spawn", nothing) as executor:
            list(executor.map(busy, [sys.argv[1], sys.argv[1]]))
"""
TASKS = """if True:
    import os, time
    from pathlib import Path
    def nothing(): pass
    def busy(folder):
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(600)
"""


def begin() -> None:
    """What a worker does first."""


def busy(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def working(folder: Path, count: int) -> list[int]:
    """The processes that are busy, once there are so many."""
    while len(found := [int(path.name) for path in folder.iterdir()]) < count:
        time.sleep(0.02)
    return found


def end(processes: list[int]) -> bool:
    """Whether they do, in a moment; a zombie, whose parent was killed too, has."""

    def goes_on(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    for _ in range(1000):
        if not any(map(goes_on, processes)):
            return True
        time.sleep(0.02)
    return False


def test_a_pool_works() -> None:
    with pool(2, "spawn", begin) as executor:
        assert list(executor.map(abs, [-1, -2, 3])) == [1, 2, 3]


def interrupted(method: str, folder: Path) -> list[int]:
    """The workers of a pool that was interrupted."""
    found = []
    with contextlib.suppress(KeyboardInterrupt), pool(2, method, begin) as executor:  # type: ignore[arg-type]
        for _ in range(3):
            executor.submit(busy, str(folder))
        found = working(folder, 2)
        raise KeyboardInterrupt
    return found


@linux
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_interruption_does_not_wait_for_what_workers_do(tmp_path: Path, method: str) -> None:
    assert end(interrupted(method, tmp_path))


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_of_a_killed_process_end_too(tmp_path: Path, number: int) -> None:
    (tmp_path / "tests_of_workers.py").write_text(TASKS)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "busy").mkdir()
    root = Path(__file__).parents[2]
    surroundings = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    started = subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path / "busy"], env=surroundings)
    found = working(tmp_path / "busy", 2)
    started.send_signal(number)
    assert started.wait() == -number
    assert end(found)
