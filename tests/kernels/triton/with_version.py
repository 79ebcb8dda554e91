"""`make triton TRITON=3.6.0`: the tests of this folder with another Triton, which stays beside the installed one.

The version is put into build/triton-VERSION, alone, and stands first in the path of the tests. Triton 3.6 interprets
loops only with NumPy below 2.4, so it brings one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
NUMPY = {"3.6": "numpy==2.3.5"}  # what goes with a version


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("which version? make triton TRITON=3.6.0")
    version, *options = sys.argv[1:]
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        extra = [NUMPY[version[:3]]] if version[:3] in NUMPY else []
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}", *extra], check=True)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/triton", *options]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
