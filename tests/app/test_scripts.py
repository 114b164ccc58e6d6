"""What the scripts say while they set up, and what they do when something fails."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_stages(script: str) -> subprocess.CompletedProcess:
    """Bash, as setup.sh is: strict, with two stages."""
    prologue = f"set -euo pipefail; source {ROOT}/scripts/stages.sh; stages=2\n"
    return subprocess.run(["bash", "-c", prologue + script], capture_output=True, text=True, timeout=60)


def test_a_stage_says_what_it_does_and_how_long_it_took():
    run = run_stages('skip "nothing to fetch"; stage "waiting" sleep 1')
    assert run.returncode == 0 and run.stderr == ""
    assert re.fullmatch(r"\[1/2\] nothing to fetch\n\[2/2\] waiting \.\.\. [12] s\n", run.stdout)


def test_a_stage_keeps_its_output_to_itself_and_reads_its_input():
    run = run_stages('stage "reading" grep -x word <<<"word"; echo then')
    assert run.stdout.splitlines()[1:] == ["then"] and run.returncode == 0


def test_a_failed_stage_shows_its_output_and_ends_everything():
    run = run_stages("""stage "failing" sh -c 'echo why; exit 7'; echo never""")
    assert run.returncode == 7
    assert run.stderr == "why\nfailed: sh -c echo why; exit 7\n" and "never" not in run.stdout


def test_a_stage_of_several_commands_ends_at_the_first_that_fails():
    run = run_stages('both() { false; echo second; }; stage "both" both')
    assert run.returncode == 1 and "second" not in run.stderr


def commands_of(group: int) -> list[bytes]:
    """The command lines of a process group; empty for a process that is dead."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(ProcessLookupError, FileNotFoundError):  # gone since
            if os.getpgid(int(path.parent.name)) == group:
                commands.append(path.read_bytes())
    return commands


def test_ctrl_c_ends_what_a_stage_runs():
    script = f"source {ROOT}/scripts/stages.sh; stages=1; stage endless tail -f /dev/null"
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, start_new_session=True)

    def is_running() -> bool:
        return b"tail\0-f\0/dev/null\0" in commands_of(process.pid)

    try:
        while not is_running():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert not is_running()
    finally:
        if is_running():
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("groups", "there", "absent"),
    [(("build", "run"), "torch==2.11.*", "pytest==9.*"), (("build", "run", "test"), "pytest==9.*", "datasets")],
)
def test_requirements_are_those_of_pyproject(groups, there, absent):
    command = [sys.executable, ROOT / "scripts" / "requirements.py", *groups]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert there in lines and absent not in lines


def test_packages_that_the_system_has_never_heard_of_are_missing_and_no_error():
    """As on a bare machine: dpkg-query fails there, and the script must go on."""
    function = re.search(r"^installed_packages\(\) \{.*?^\}", (ROOT / "scripts/setup.sh").read_text(), re.M | re.S)[0]
    script = (
        f'set -euo pipefail\n{function}\nfound=$(installed_packages dpkg no-such-package | xargs)\necho "found $found"'
    )
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert run.stdout == "found dpkg\n" and run.returncode == 0, run.stderr


def test_an_unknown_argument_is_refused_before_anything_is_done():
    run = subprocess.run([ROOT / "scripts" / "setup.sh", "everything"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "setup: expected app, test or nothing, got everything\n"
