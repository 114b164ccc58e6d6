"""The examples of the README run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from readme_table import newest_records, table, with_tables

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


def test_tables_are_what_the_script_writes_from_the_records():
    records = newest_records(ROOT / "benchmarks/records")
    assert records
    assert README == with_tables(README, records)


def test_a_table_puts_all_peers_of_a_measurement_with_a_goal_on_one_line():
    row = dict(case="mid bfloat16", metric="decode", value=10.0, unit="tokens/s", percent_of_bound=None, goal=None)
    rows = [
        row | dict(peer="a", peer_value=5.0, ratio=2.0, goal=1.5),
        row | dict(peer="b", peer_value=None, ratio=None),
        row | dict(peer="c", peer_value=20.0, ratio=0.5),
        row | dict(peer=None, peer_value=None, ratio=None, percent_of_bound=91.2, goal=90.0),
        row | dict(metric="prefill", value=1234.5, peer="c", peer_value=0.1234, ratio=10004.0, goal=2.0),
        row | dict(metric="memory", value=0.5, unit="x", peer=None, peer_value=None, ratio=None, goal=0.75),
        row | dict(metric="load", unit="GB/s", peer="d", peer_value=5.0, ratio=2.0),
    ]
    record = dict(name="model", device="CPU", date="2026-01-01", commit="0" * 40, versions={"torch": "2"}, rows=rows)
    assert table(record).splitlines()[2:] == [
        "| case | measured | ours | of bound | a (ours ×) | c (ours ×) |",
        "|---|---|---|---|---|---|",
        "| mid bfloat16 | decode | 10 tokens/s | 91 %, goal 90 | 5 (×2.00, goal 1.5) | 20 (×0.50) |",
        "| mid bfloat16 | prefill | 1,234 tokens/s |  |  | 0.123 (×10004.00, goal 2) |",
        "| mid bfloat16 | memory | 0.5 x, goal 0.75 |  |  |  |",
    ]
    without_goals = record | dict(rows=rows[-1:])
    assert with_tables(README, [record, without_goals]) == with_tables(README, [record])
