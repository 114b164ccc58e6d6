"""`chat --save`, `--load` and `--prompt-cache`: a conversation goes on in another process."""

import json
import re
from pathlib import Path

import pytest

from binary import mixtral, ok

CHAT = ["chat", "--temp", "0", "-n", "8", "--ignore-eos"]


def test_a_saved_conversation_goes_on_as_if_it_had_not_ended(tmp_path):
    file = tmp_path / "talk.json"
    whole = ok(*CHAT, "--system", "Be brief.", stdin=b"Once upon a time\nAnd then?\n")
    first = ok(*CHAT, "--system", "Be brief.", "--save", file, stdin=b"Once upon a time\n")
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "Once upon a time" and messages[2]["content"].encode() + b"\n" == first
    second = ok(*CHAT, "--load", file, "--save", file, stdin=b"And then?\n")
    assert first + second == whole
    assert len(json.loads(file.read_text())["messages"]) == 5
    assert list(tmp_path.iterdir()) == [file]


def test_a_prompt_cache_saves_the_computation_too(tmp_path):
    said = b"Once upon a time " * 8 + b"\n"  # whole pages are kept
    file, cache = tmp_path / "talk.json", tmp_path / "talk.cache"
    files = ["--save", file, "--prompt-cache", cache, "-v"]
    first = mixtral(*CHAT, *files, stdin=said)
    second = mixtral(*CHAT, "--load", file, *files, stdin=b"And then?\n")
    cached = re.search(rb"\((\d+) cached\)", second.stderr)
    assert first.returncode == second.returncode == 0 and b"cached" not in first.stderr
    assert cached and int(cached[1]) > 16
    assert first.stdout + second.stdout == ok(*CHAT, stdin=said + b"And then?\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "messages: must be a list"),
        ('{"messages": [5]}', "message 0: role must be a text"),
        ('{"messages": [{"role": "user"}]}', "message 0: content must be a text"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "message 0: role must be system, user or assistant"),
    ],
)
def test_a_file_that_holds_no_conversation_is_refused(tmp_path: Path, text, words):
    file = tmp_path / "talk.json"
    file.write_text(text)
    run = mixtral(*CHAT, "--load", file, "--save", file, stdin=b"Hi\n")
    assert run.returncode == 3 and words in run.stderr.decode() and run.stderr.count(b"\n") == 1
    assert file.read_text() == text


def test_files_that_cannot_be_opened_are_named(tmp_path):
    missing = mixtral(*CHAT, "--load", tmp_path / "none.json", stdin=b"Hi\n")
    assert missing.returncode == 2 and b"none.json" in missing.stderr
    unwritable = mixtral(*CHAT, "--save", tmp_path / "no" / "talk.json", stdin=b"Hi\n")
    assert unwritable.returncode == 5 and b"talk.json" in unwritable.stderr
