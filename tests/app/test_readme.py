"""The examples of the README run as they stand there."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import escape
from pathlib import Path

import pytest

import terminal_svg
from benchmark_tables import newest_records, page, readme_table, table, with_table

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


def run_in(folder: Path, *command: str | Path) -> str:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_cpp_example_builds_against_the_installed_library(tmp_path):
    """With nothing of the source tree: headers, CMake package, libraries, binary and bundled model are installed."""
    prefix, project = tmp_path / "prefix", tmp_path / "project"
    project.mkdir()
    run_in(ROOT, "cmake", "--install", "build", "--prefix", prefix, "--component", "cpp")
    (project / "main.cpp").write_text(blocks("cpp")[0])
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(example LANGUAGES CXX)\nfind_package(mixtral 0.1 REQUIRED)\n"
        "add_executable(example main.cpp)\ntarget_link_libraries(example PRIVATE mixtral::mixtral)\n"
    )
    run_in(project, "cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run_in(project, "cmake", "--build", "build")
    text = run_in(project, "build/example", prefix / "share/mixtral/models/demo")
    assert len(text.split()) > 10
    described = json.loads(run_in(tmp_path, prefix / "bin/mixtral", "info", "--json"))
    assert described["total_parameters"] == 5512896
    linked = run_in(tmp_path, "ldd", prefix / "bin/mixtral")
    assert f"{prefix}/lib/libmixtral_ops.so" in linked.replace("bin/../", "") and "not found" not in linked


def test_tables_are_what_the_script_writes_from_the_records():
    records = newest_records(ROOT / "benchmarks/records")
    assert records
    assert README == with_table(README, records)
    assert (ROOT / "docs/benchmarks.md").read_text() == page(records)
    assert len(readme_table(records).splitlines()) <= 6


ROW = dict(case="mid bfloat16", metric="decode", value=10.0, unit="tokens/s", percent_of_bound=None)
ROWS = [
    ROW | dict(peer="a", peer_value=5.0, ratio=2.0),
    ROW | dict(peer="b", peer_value=None, ratio=None),
    ROW | dict(peer="c", peer_value=20.0, ratio=0.5),
    ROW | dict(peer=None, peer_value=None, ratio=None, percent_of_bound=91.2),
    ROW | dict(metric="prefill 512", value=1234.5, peer="c", peer_value=0.1234, ratio=10004.0),
]
RECORD = dict(
    name="model",
    device="Some(R) CPU (family 1, model 2)",
    date="2026-01-01",
    commit="0" * 40,
    versions={"torch": "2", "instruction set": "avx512"},
    rows=ROWS,
)


def test_a_table_puts_all_peers_of_a_measurement_on_one_line():
    assert table(RECORD).splitlines() == [
        "| case | measured | ours | of bound | a | c |",
        "|---|---|---|---|---|---|",
        "| mid bfloat16 | decode | 10 tokens/s | 91 % | 5 (×2.00) | 20 (×0.50) |",
        "| mid bfloat16 | prefill 512 | 1,234 tokens/s |  |  | 0.123 (×10004.00) |",
    ]


def test_readme_compares_with_the_best_peer_though_it_be_faster():
    line = readme_table([RECORD]).splitlines()[-1]
    assert line == "| Some CPU, AVX-512 | 1,234, 10004.00 × c | 10, 0.50 × c |  |  |"


def test_readme_has_a_line_for_a_processor_held_to_avx2():
    held = [row | dict(case=f"small {dtype} avx2") for dtype in ("bfloat16", "int4") for row in ROWS]
    record = RECORD | dict(rows=held + [row | dict(case="small bfloat16") for row in ROWS])
    assert readme_table([record, record | dict(name="model-isa")]).splitlines()[2:] == [
        "| Some CPU, AVX-512 | 1,234, 10004.00 × c | 10, 0.50 × c |  |  |",
        "| Some CPU, AVX-512 held to AVX2 | 1,234, 10004.00 × c | 10, 0.50 × c |  | 10, 0.50 × c |",
    ]


def test_the_picture_shows_what_the_binary_prints():
    """Without what it generates: another processor may round to another text."""
    picture = terminal_svg.PICTURE.read_text()
    ElementTree.fromstring(picture)
    for arguments, most in terminal_svg.COMMANDS:
        assert escape(terminal_svg.shell_line(arguments)) in picture
        if arguments[0] != "generate":
            assert all(f">{escape(line)}</text>" in picture for line in terminal_svg.output_of(arguments)[:most])


def test_links_lead_to_files():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
