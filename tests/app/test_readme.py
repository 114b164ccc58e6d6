"""The examples of the README run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_example_runs(index):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run(
        [sys.executable, "-c", blocks("python")[index]], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert index > 0 or len(run.stdout.split()) > 20


def test_cpp_example_is_the_one_that_was_compiled_and_it_runs():
    assert blocks("cpp") == [(ROOT / "tests/cpp/readme_example.cpp").read_text()]
    run = subprocess.run([ROOT / "build/bin/readme_example"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) > 10
