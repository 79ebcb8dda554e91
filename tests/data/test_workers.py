"""Workers end with the one that started them."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openxlstm.data.workers import pool

PROGRAM = """if True:
    import signal, sys
    from openxlstm.data.workers import pool
    from tasks_of_workers import busy, begin
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
        with pool(2, sys.argv[1], begin) as executor:
            list(executor.map(busy, 3 * [sys.argv[2]]))
"""
TASKS = """if True:
    import os, signal, time
    from pathlib import Path
    def begin():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    def busy(folder):
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(600)
"""
PATIENCE = 60  # seconds


def goes_on(process: int) -> bool:
    """Whether a process is there; a zombie, whose parent was killed too, is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_pool_works() -> None:
    with pool(2, "spawn", gc.collect) as executor:
        assert list(executor.map(abs, [-1, -2, 3])) == [1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_do_not_outlive_the_one_that_started_them(tmp_path: Path, method: str, number: int) -> None:
    """In the middle of what they do; they ignore Ctrl-C themselves."""
    (tmp_path / "tasks_of_workers.py").write_text(TASKS)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "busy").mkdir()
    surroundings = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}
    command = [sys.executable, tmp_path / "program.py", method, tmp_path / "busy"]
    started, until = subprocess.Popen(command, env=surroundings), time.monotonic() + PATIENCE
    while len(found := [int(path.name) for path in (tmp_path / "busy").iterdir()]) < 2:
        assert started.poll() is None, "it ended by itself"
        assert time.monotonic() < until, "nobody works"
        time.sleep(0.02)
    started.send_signal(number)
    assert started.wait(PATIENCE) == -number
    until = time.monotonic() + PATIENCE
    while any(map(goes_on, found)):
        assert time.monotonic() < until, f"{found} go on"
        time.sleep(0.02)
