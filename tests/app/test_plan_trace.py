"""`--plan-trace` and `--plan-replay`: the same command computes and picks the same, pass by pass."""

import json
from pathlib import Path

import pytest

from binary import mixtral, ok

COMMAND = ("generate", "-p", "One two three one two three one two", "-n", "24", "--ignore-eos", "--speculate", "6")
SAMPLED = ("--samples", "3", "--temp", "0.7", "--json", "--seed")


def generate(*arguments: str | Path) -> None:
    ok(*COMMAND, *SAMPLED, "5", *arguments)


@pytest.mark.parametrize("layout", [[], ["--tp", "2"], ["--pp", "2"]], ids=" ".join)
def test_the_same_command_is_reproduced_and_another_one_is_not(layout, tmp_path):
    """Also where several processes compute a pass, and several passes are computed at a time."""
    path = tmp_path / "plan.jsonl"
    generate("--plan-trace", path, *layout)
    passes = [json.loads(line) for line in path.read_text().splitlines()]
    picked = [0, 0, 0]
    for entry in passes:
        for request in entry["requests"]:
            picked[request["id"]] += len(request["picked"])
    assert picked == [24, 24, 24]
    generate("--plan-replay", path, *layout)
    other = mixtral(*COMMAND, *SAMPLED, "6", "--plan-replay", path, *layout)
    assert (other.returncode, other.stdout) == (5, b"")
    assert other.stderr.startswith(b"mixtral: plan replay: pass ") and b" as picked [" in other.stderr
    assert other.stderr.count(b"\n") == 1


def test_files_that_cannot_be_used(tmp_path):
    missing = mixtral(*COMMAND, "--plan-replay", tmp_path / "none")
    assert missing.returncode == 3 and b"none: cannot be read" in missing.stderr
    unwritable = mixtral(*COMMAND, "--plan-trace", tmp_path / "none" / "plan")
    assert unwritable.returncode == 5 and b"cannot write" in unwritable.stderr
    both = mixtral(*COMMAND, "--plan-trace", tmp_path / "a", "--plan-replay", tmp_path / "b")
    assert both.returncode == 2 and b"--plan-replay" in both.stderr
