"""scripts/gpu_check.sh with a fake clock and a fake device: in time, whatever hangs, and nothing that ended is lost."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import runner
import stages
from runner import Runner, Stage, left_out

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "scripts" / "gpu_check"


class Killed(Exception):
    pass


class Machine:
    """Stages take as long as ``seconds`` says and end as ``codes`` says; one that is stuck has to be killed."""

    def __init__(self, seconds=None, codes=None, stuck=(), dies_at=float("inf")) -> None:
        self.now, self.seconds, self.codes, self.stuck, self.dies_at = 0.0, seconds or {}, codes or {}, stuck, dies_at
        self.calls: dict[str, list[str]] = {}

    def clock(self) -> float:
        return self.now

    def call(self, command: list[str], limit: float, log: io.TextIOBase, environment: dict[str, str]) -> int:
        name = Path(log.name).read_text().rpartition("\n== ")[2].partition(":")[0]
        self.calls[name] = command
        log.write(f"{name} speaks\n")
        takes, code = self.seconds.get(name, 1.0), self.codes.get(name, 0)
        if name in self.stuck:
            takes, code = limit + runner.KILL_AFTER, 137
        elif takes > limit:
            takes, code = limit, 124
        if self.now + takes >= self.dies_at:
            raise Killed
        self.now += takes
        return code


def some(names: str, **options) -> list[Stage]:
    return [Stage(name, 5, 20, lambda broken: ["run", *sorted(broken)], **options) for name in names]


def everything() -> list[Stage]:
    """The real stages, as if this machine had all tools."""
    return [replace(stage, missing=str) for stage in stages.all_stages(None)]


def run(out: Path, machine: Machine, chosen: list[Stage], minutes: float, dry: bool = False) -> tuple[int, dict]:
    """Exit status, and the rows of the summary by stage."""
    code = Runner(out, minutes, {"commit": "c"}, dry, machine.clock, machine.call).run(chosen)
    return code, rows_of(out)


def rows_of(out: Path) -> dict[str, dict]:
    """Those of the folder, which the tar must have too."""
    summary = json.loads((out / "summary.json").read_text())
    with tarfile.open(out / "gpu_check.tar") as tar:
        assert json.load(tar.extractfile("summary.json")) == summary
        assert "log.txt" in tar.getnames()
    return {row["stage"]: row for row in summary["stages"]}


@pytest.mark.parametrize("seed", range(40))
def test_ends_within_its_minutes_whatever_stages_do(seed, tmp_path):
    choose = random.Random(seed)
    chosen, minutes = everything(), choose.uniform(1, 14)
    names = [stage.name for stage in chosen]
    seconds = {stage.name: choose.uniform(0, 1.5) * choose.choice([stage.expected, stage.limit]) for stage in chosen}
    codes = {name: choose.choice([0, 0, 0, 1, 3, -11]) for name in names[2:]}
    machine = Machine(seconds, codes, stuck=set(choose.sample(names, choose.randint(0, 8))))
    _, rows = run(tmp_path, machine, chosen, minutes)
    assert machine.now <= 60 * minutes
    assert list(rows) == names and set(machine.calls) == {n for n, row in rows.items() if row["status"] != "left out"}
    assert all(row["reason"] for row in rows.values() if row["status"] == "left out")


def test_what_has_no_time_is_named_before_and_after(tmp_path):
    chosen, machine = some("abcd"), Machine(dict.fromkeys("abcd", 5.0))
    minutes = (17 + runner.KILL_AFTER + runner.SAVING) / 60
    assert [stage.name for stage in left_out(chosen, minutes)] == ["d"]
    code, rows = run(tmp_path, machine, chosen, minutes)
    assert code == 0 and [row["status"] for row in rows.values()] == ["passed"] * 3 + ["left out"]
    assert rows["d"]["reason"] == "takes 5 s, 2 s are left"


def test_time_that_a_stage_does_not_need_is_given_to_later_ones(tmp_path):
    _, rows = run(tmp_path, Machine(dict.fromkeys("abcd", 1.0)), some("abcd"), 24 / 60)
    assert all(row["status"] == "passed" for row in rows.values())


@pytest.mark.parametrize(
    ("code", "status", "given_up"),
    [(0, "passed", False), (3, "wrong", False), (1, "failed", True), (-11, "failed", True)],
)
def test_a_family_that_crashed_is_left_out_of_what_follows(code, status, given_up, tmp_path):
    chosen = [*some("a", family="tile"), *some("b", family="fp8"), *some("c", family="tile"), *some("d")]
    machine = Machine(codes={"a": code})
    failed, rows = run(tmp_path, machine, chosen, 5)
    assert failed == (code != 0) and rows["a"]["status"] == status and rows["b"]["status"] == "passed"
    assert rows["c"]["status"] == ("left out" if given_up else "passed")
    assert machine.calls["d"] == (["run", "tile"] if given_up else ["run"])


def test_tests_of_a_family_that_hung_are_not_chosen(tmp_path):
    machine = Machine(stuck={"fp8"})
    _, rows = run(tmp_path, machine, everything(), 60)
    assert rows["fp8"]["status"] == "hung" and rows["fp8"]["reason"] == "stopped after 45 s"
    assert rows["time moe fp8"]["status"] == rows["counters fp8"]["status"] == "left out"
    assert rows["time moe int4"]["status"] == "passed"
    assert "cuda and not (fp8)" in machine.calls["op tests"] and "cuda" in machine.calls["simple kernels"]
    assert "MIXTRAL_CUDA_KERNELS=simple" in machine.calls["model"]


def test_nothing_follows_a_required_stage_that_failed(tmp_path):
    code, rows = run(tmp_path, Machine(codes={"b": 1}), some("a") + some("b", required=True) + some("cd"), 5)
    assert code == 1 and [rows[name]["status"] for name in "abcd"] == ["passed", "failed", "left out", "left out"]
    assert rows["c"]["reason"] == "b failed"


def test_a_group_ends_where_one_of_it_fails_and_hints_do_not_count(tmp_path):
    code, rows = run(tmp_path, Machine(codes={"a": 9}), some("ab", group="counters", advisory=True) + some("c"), 5)
    assert code == 0 and [rows[name]["status"] for name in "abc"] == ["failed", "left out", "passed"]


def test_a_missing_tool_is_the_reason(tmp_path):
    machine = Machine()
    _, rows = run(tmp_path, machine, some("a", missing=lambda: "ncu is not installed"), 5)
    assert rows["a"] == {"stage": "a", "status": "left out", "seconds": 0.0, "reason": "ncu is not installed"}
    assert not machine.calls


@pytest.mark.parametrize("second", range(0, 45, 3))
def test_killed_at_any_second_all_that_ended_is_kept(second, tmp_path):
    machine = Machine(dict.fromkeys("abcdefgh", 5.0), {"c": 3}, stuck={"e"}, dies_at=second)
    try:
        run(tmp_path, machine, some("abcdefgh"), 10)
    except Killed:
        pass
    ended = [name for name in machine.calls][: -1 if second < 60 else None]
    if ended:
        rows = rows_of(tmp_path)
        assert list(rows) == ended
        assert [rows[name]["status"] for name in ended] == [{"c": "wrong", "e": "hung"}.get(n, "passed") for n in ended]


REAL = """
import sys
sys.path.insert(0, {programs!r})
from pathlib import Path
from runner import Runner, Stage
stages = [Stage(f"s{{n}}", 0.1, 5, lambda _, n=n: ["sh", "-c", f"sleep 0.02; echo {{n}}"]) for n in range(60)]
Runner(Path({out!r}), 5, {{}}).run(stages)
"""


@pytest.mark.parametrize("lines", [1, 7, 20])
def test_a_real_kill_leaves_whole_files(lines, tmp_path):
    code = REAL.format(programs=str(PROGRAMS), out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    said = [process.stdout.readline() for _ in range(lines)]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with tarfile.open(tmp_path / "gpu_check.tar") as tar:  # the folder's own summary may be newer
        kept = [row["stage"] for row in json.load(tar.extractfile("summary.json"))["stages"]]
    json.loads((tmp_path / "summary.json").read_text())
    named = [line.split("] ")[1].split(":")[0] for line in said if line.startswith("[")]
    assert named and kept[: len(named)] == named


@pytest.mark.parametrize("script", ["trap '' INT; sleep 30", "sleep 30", "sleep 30 & wait"])
def test_a_stage_that_hangs_is_stopped_with_its_children(script, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "KILL_AFTER", 0.3)
    marked = script.replace("30", "30.0625")
    Runner(tmp_path, 1, {}).run([Stage("hangs", 0.1, 0.3, lambda _: ["bash", "-c", marked])])
    row = rows_of(tmp_path)["hangs"]
    assert row["status"] == "hung" and row["seconds"] < 20
    assert b"sleep\x0030.0625" not in b"".join(
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
    )


def test_the_card_is_asked_first_and_a_driver_that_hangs_costs_its_limit_alone(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.setattr(runner, "KILL_AFTER", 0.3)
    card = next(stage for stage in stages.all_stages(None) if stage.name == "card")
    for script, status in (("echo NVIDIA H200 $*", "passed"), ("sleep 30", "hung")):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        assert Runner(tmp_path, 5, {}).run([replace(card, limit=1.0)]) == 0  # a hint
        assert rows_of(tmp_path)["card"]["status"] == status
        assert ("NVIDIA H200 --query-gpu=name,driver_version" in (tmp_path / "log.txt").read_text()) == (
            status == "passed"
        )


def test_a_dry_run_launches_nothing_and_says_what_each_stage_may_take(tmp_path, capsys):
    machine = Machine(dict.fromkeys("ab", 100.0))
    chosen = some("a", dry=["look"]) + some("b", missing=lambda: "ncu is not installed", dry=["look"])
    code, _ = run(tmp_path, machine, chosen, 1, dry=True)
    assert code == 0 and machine.calls == {"a": ["look"]}
    assert capsys.readouterr().out == "a: 20 s allowed\nb: 20 s allowed; not here: ncu is not installed\n"


def test_the_real_dry_commands_name_programs_that_are_there():
    for stage in stages.all_stages(None):
        for word in (*stage.dry, *stage.command(set())):
            if word.startswith(str(ROOT)) and word.endswith(".py"):
                assert Path(word).exists(), stage.name


def start(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "scripts" / "gpu_check.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_wrong_arguments_are_errors_in_words(tmp_path):
    assert "--minutes must be from 1 to 600, got 0.5" in start("--minutes", 0.5).stderr
    done = start("--prebuilt", tmp_path, "--dry-run")
    assert done.returncode == 2 and "was not made by scripts/gpu_prebuild.sh: it has no file commit" in done.stderr
    (tmp_path / "commit").write_text("1234\n")
    done = start("--prebuilt", tmp_path, "--dry-run", MIXTRAL_COMMIT="5678")
    assert done.returncode == 1 and "was built from commit 1234, the tree is 5678: build it again" in done.stderr


@pytest.mark.parametrize("loads", [True, False])
def test_it_builds_where_the_prebuilt_libraries_do_not_load(loads, tmp_path, monkeypatch):
    cmake = tmp_path / "cmake"
    cmake.write_text('#!/bin/sh\necho cmake "$@"\n')
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(stages, "LIBRARY_CHECK", f"raise SystemExit({0 if loads else 1})")
    done = subprocess.run(stages.build_stage(Path("/else where")).command(set()), capture_output=True, text=True)
    assert done.returncode == 0
    if loads:
        assert done.stdout == ""
    else:
        configure, build = done.stdout.splitlines()
        assert "-DMIXTRAL_CUDA=ON" in configure and configure.endswith("-DMIXTRAL_JSON_INCLUDE_DIR=/else where/include")
        assert build.endswith("--target python_package mixtral_tensor_maps")
