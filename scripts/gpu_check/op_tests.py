"""Tests with pytest, on eight cores where it can, and their row in the record ``cuda-correctness``.

``op_tests.py NAME ARGUMENTS...``: the arguments are pytest's, and so is the exit status.
"""

import os
import subprocess
import sys
from pathlib import Path

from common import RECORDS
from record_tests import main as record
from stages import ROOT, has_module

WORKERS = ["-n", "8", "--dist", "worksteal"]
# A kernel that never ends holds its thread for ever: only the end of the process helps.
TIMEOUT = ["--timeout", "60", "--timeout-method", "thread"]


def options() -> list[str]:
    """Of what is installed; what is not is named."""
    chosen = []
    for package, module, flags in (("pytest-xdist", "xdist", WORKERS), ("pytest-timeout", "pytest_timeout", TIMEOUT)):
        if has_module(module):
            chosen += flags
        else:
            print(f"{package} is not installed: without {' '.join(flags)}", flush=True)
    return chosen


def main(name: str, arguments: list[str]) -> int:
    report = ROOT / "build-gpu" / "reports" / f"{os.environ.get('MIXTRAL_CUDA_KERNELS', 'simple')}-{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", *options()]
    tests = subprocess.Popen([*command, f"--junitxml={report}", *arguments], cwd=ROOT)
    while True:
        try:
            code = tests.wait()
            break
        except KeyboardInterrupt:  # the end of the stage's time: pytest got it too, and writes what it has
            continue
    record("cuda-correctness", "cuda", Path(os.environ.get("MIXTRAL_RECORDS", RECORDS)), [report])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
