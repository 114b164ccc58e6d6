"""Runs stages within a number of minutes and keeps the result of each one the moment it ends.

Standard library only. The folder of the results holds ``summary.json``, one row a stage; ``log.txt``, what the stages
printed; the records that they wrote; and ``gpu_check.tar`` of all these. Each file is replaced in one step: whenever
the run is killed, the folder and the tar have every stage that had ended.
"""

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

DRY_LIMIT = 300.0  # seconds for a stage that launches nothing, on however slow a machine
KILL_AFTER = 5.0  # seconds between asking a stage to end and killing it
SAVING = 2.0  # seconds to keep the last result
WRONG = 3  # exit status of a stage whose kernels ran to their end with wrong numbers
HUNG = (124, 137, -9)  # of timeout(1): ended when asked to; killed, and timeout(1) with it


@dataclass(frozen=True)
class Stage:
    """One process of its own."""

    name: str
    expected: float  # seconds; with fewer left it is not begun
    limit: float  # seconds after which it is stopped
    command: Callable[[set[str]], list[str]]  # for the kernel families that hung or crashed before
    dry: list[str] = field(default_factory=lambda: ["true"])  # the same up to the first launch
    family: str | None = None  # of kernels; given up if this stage hangs or crashes
    uses: tuple[str, ...] = ()  # families; left out if one of them was given up
    group: str | None = None  # the rest of it is left out if one of it fails
    missing: Callable[[], str] = str  # why it cannot run on this machine; "": it can
    required: bool = False  # nothing runs after it has failed
    advisory: bool = False  # its failure is not one of the run
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What became of a stage."""

    stage: str
    status: str  # passed, wrong, failed, hung or left out
    seconds: float = 0.0
    reason: str = ""


def run_command(command: list[str], limit: float, log: io.IOBase, environment: dict[str, str]) -> int:
    """Exit status. timeout(1) is a process of its own: it stops the stage even if this one is gone."""
    guarded = ["timeout", "--signal=INT", f"--kill-after={KILL_AFTER:g}", f"{limit:g}", *command]
    process = subprocess.Popen(guarded, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment)
    code = process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # timeout(1) leads a group: what is left of it may hold the GPU
    return code


class Runner:
    """``call`` and ``clock`` are those of the machine, or a test's."""

    def __init__(
        self,
        out: Path,
        minutes: float,
        facts: dict[str, str],
        dry: bool = False,
        clock: Callable[[], float] = time.monotonic,
        call: Callable[..., int] = run_command,
    ) -> None:
        self._out, self._facts, self._dry, self._clock, self._call = out, facts, dry, clock, call
        self._begin = clock()
        self._end = self._begin + 60 * minutes
        self.results: list[Result] = []
        self._broken: set[str] = set()  # families
        self._failed_groups: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")

    def run(self, stages: list[Stage]) -> int:
        """0 if no stage failed; those that are advisory, and those left out, do not count."""
        failed = False
        for n, stage in enumerate(stages, start=1):
            result = self._run_stage(stage)
            bad = result.status not in ("passed", "left out")
            failed |= bad and not stage.advisory
            self.results.append(result)
            if stop := bad and stage.required:
                self.results += [Result(s.name, "left out", reason=f"{stage.name} failed") for s in stages[n:]]
            self._save()
            print(self._line(stage, result), flush=True)
            if stop:
                print(f"left out, since {stage.name} failed: {', '.join(s.name for s in stages[n:])}", flush=True)
                break
        return int(failed)

    def _reason_to_leave_out(self, stage: Stage) -> str:
        if broken := self._broken.intersection((stage.family, *stage.uses)):
            return f"{', '.join(sorted(broken))} hung or crashed"
        if stage.group in self._failed_groups:
            return f"{self._failed_groups[stage.group]} failed"
        if missing := stage.missing():
            return missing
        if self._dry:
            return ""
        left = self._left()
        return f"takes {stage.expected:.0f} s, {max(left, 0):.0f} s are left" if left < stage.expected else ""

    def _left(self) -> float:
        """Seconds that a stage may take, so that all ends in time even if it has to be killed."""
        return self._end - self._clock() - KILL_AFTER - SAVING

    def _run_stage(self, stage: Stage) -> Result:
        if reason := self._reason_to_leave_out(stage):
            return Result(stage.name, "left out", reason=reason)
        limit, begin = DRY_LIMIT if self._dry else min(stage.limit, self._left()), self._clock()
        command = stage.dry if self._dry else stage.command(self._broken)
        with (self._out / "log.txt").open("a") as log:
            log.write(f"\n== {stage.name}: {' '.join(command)}\n")
            log.flush()
            code = self._call(command, limit, log, stage.environment)
        seconds = self._clock() - begin
        status = {0: "passed", WRONG: "wrong"}.get(code, "hung" if code in HUNG else "failed")
        reason = {"hung": f"stopped after {seconds:.0f} s", "failed": f"exit status {code}"}.get(status, "")
        if status in ("hung", "failed"):
            if stage.family:
                self._broken.add(stage.family)
            if stage.group and status == "failed":
                self._failed_groups[stage.group] = stage.name
        return Result(stage.name, status, seconds, reason)

    def _line(self, stage: Stage, result: Result) -> str:
        if self._dry and result.status in ("passed", "left out"):
            return f"{stage.name}: {stage.limit:.0f} s allowed" + (result.reason and f"; not here: {result.reason}")
        line = f"[{self._clock() - self._begin:4.0f} s] {stage.name}: {result.status}"
        if result.status == "left out":
            return f"{line}: {result.reason}"
        tail = (self._out / "log.txt").read_text(errors="replace").rpartition(f"\n== {stage.name}: ")[2]
        lines = tail.splitlines()[1:][-3 if result.status == "passed" else -25 :]
        return "\n".join([f"{line} in {result.seconds:.1f} s{result.reason and ', ' + result.reason}", *lines])

    def _save(self) -> None:
        rows = [asdict(result) for result in self.results]
        replace(self._out / "summary.json", (json.dumps(self._facts | {"stages": rows}, indent=1) + "\n").encode())
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(self._out.iterdir()):
                if path.suffix in (".json", ".txt"):
                    tar.add(path, path.name)
        replace(self._out / "gpu_check.tar", archive.getvalue())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def left_out(stages: list[Stage], minutes: float) -> list[Stage]:
    """Those without time if each of the others takes what it is expected to."""
    left, others = 60 * minutes - KILL_AFTER - SAVING, []
    for stage in stages:
        if stage.expected <= left:
            left -= 0 if stage.missing() else stage.expected
        else:
            others.append(stage)
    return others
