"""`--kv-memory` and `--speculate`, and which commands take the flags that they share."""

import re
import sys

import pytest

from binary import ROOT, environment, mixtral, ok, ok_json

HELD_OUT = ROOT / "tests" / "data" / "held_out" / "bible.txt"
PROMPT = "Once upon a time there was a king who had three daughters."
GENERATE = ["generate", "-p", PROMPT, "-n", "8", "--ignore-eos"]
BENCH = ["bench", "--prompt-tokens", "40", "--new-tokens", "24", "--repeat", "1"]
PASSKEY = ["passkey", "--lengths", "150", "--depths", "1", "--trials", "1", "--distances", "0"]
SHARED = [
    "--experts-per-token",
    "--trace",
    "--replay",
    "--lora",
    "--speculate",
    "--kv-memory",
    "--tensor-parallel-size",
    "--tp",
    "--pipeline-parallel-size",
    "--pp",
    "--expert-parallel",
]


def refused(code: int, *arguments: object, stdin: bytes = b"") -> str:
    run = mixtral(*arguments, stdin=stdin)
    assert (run.returncode, run.stdout) == (code, b"") and run.stderr.count(b"\n") == 1, run.stderr
    return run.stderr.decode()


@pytest.mark.parametrize("command", ["generate", "perplexity", "bench", "serve"])
def test_every_flag_that_the_commands_share_is_in_their_help(command):
    python = environment(MIXTRAL_PYTHON=sys.executable, PYTHONPATH=str(ROOT / "python"))
    text = ok(command, "--help", env=python).decode()
    assert [flag for flag in SHARED if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)] == []


@pytest.mark.parametrize("command", [GENERATE, ["perplexity", HELD_OUT], BENCH, PASSKEY], ids=lambda c: c[0])
def test_kv_memory_that_is_enough_changes_nothing(command):
    def answer(*flags: str) -> dict:
        result = ok_json(*command, *flags)
        return {key: value for key, value in result.items() if not re.search("seconds|timings|second|memory|perc", key)}

    assert answer("--kv-memory", "8MiB") == answer()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (GENERATE, r"tokens need \d+ pages \(.* KiB\), and the pool has 1 \(.* KiB\): lower max_tokens or raise"),
        (["perplexity", HELD_OUT], r"1027 tokens need .* [KM]iB, and kv_memory is 20.00 KiB: raise it, or give"),
        (["perplexity", HELD_OUT, "--contexts", "64"], r"tokens need .* KiB, and kv_memory is 20.00 KiB: raise it"),
        (PASSKEY, r"160 tokens need .* KiB, and kv_memory is 20.00 KiB: raise it"),
        (
            BENCH,
            r"--batch 1 with 64 tokens each needs 4 pages \(.* KiB\), and the pool has 1 \(.* KiB\): lower --batch",
        ),
    ],
    ids=["generate", "perplexity", "contexts", "passkey", "bench"],
)
def test_a_pool_that_cannot_hold_the_work_is_refused_with_numbers(command, words):
    assert re.search(words, refused(4, *command, "--kv-memory", "20KiB"))


def test_chat_refuses_an_answer_that_the_pool_cannot_hold():
    assert "raise kv_memory" in refused(4, "chat", "--kv-memory", "20KiB", stdin=b"Hi\n")


def test_bench_counts_the_whole_batch():
    flags = ["--kv-memory", "160KiB"]
    assert ok_json(*BENCH, "--batch", "2", *flags)["batch"] == 2
    assert "--batch 3 with 64 tokens each needs 12 pages" in refused(4, *BENCH, "--batch", "3", *flags)


@pytest.mark.parametrize("flag", ["--kv-memory", "--gpu-memory"])
def test_a_size_is_read_as_in_serve(flag):
    for wrong in ["much", "0", "-1", "4GiBs"]:
        assert f"mixtral: {flag}: must be a size such as 4GiB, got {wrong}" in refused(2, *GENERATE, f"{flag}={wrong}")
    assert "needs device cuda" in refused(2, *GENERATE, "--gpu-memory", "1.5g")
    assert "must hold a page" in refused(2, *GENERATE, "--kv-memory", "1k")
    wrong = mixtral(*GENERATE, env=environment(MIXTRAL_KV_MEMORY="much"))
    assert wrong.returncode == 2 and b"must be a size such as 4GiB, got much" in wrong.stderr


def test_bench_tells_how_many_guesses_were_right():
    plain, drafting = ok_json(*BENCH), ok_json(*BENCH, "--speculate", "4")
    assert not {"speculate", "drafted_tokens", "accepted_tokens"} & plain.keys() and plain["percent_of_roofline"] > 0
    assert drafting["speculate"] == 4 and 0 <= drafting["accepted_tokens"] <= drafting["drafted_tokens"]
    assert drafting["percent_of_roofline"] is None  # one read of the weights makes several tokens
    report = ok(*BENCH, "--speculate", "4").decode()
    drafted, accepted = map(int, re.search(r"drafted +(\d+) tokens +\((\d+) were right\)", report).groups())
    assert (drafted, accepted) == (drafting["drafted_tokens"], drafting["accepted_tokens"])
    assert "drafted" not in ok(*BENCH).decode()


def test_drafts_of_bench_leave_its_tokens_as_they_are(tmp_path):
    ok(*BENCH, "--batch", "2", "--trace", tmp_path / "plain")
    ok(*BENCH, "--batch", "2", "--speculate", "4", "--trace", tmp_path / "drafted")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "drafted").read_bytes()


def test_perplexity_takes_speculate_and_says_that_it_has_no_effect():
    plain, with_flag = (ok_json("perplexity", HELD_OUT, *flags) for flags in ([], ["--speculate", "4"]))
    assert {**plain, "seconds": 0} == {**with_flag, "seconds": 0}
    assert re.search(r"--speculate .*\n? +No effect", ok("perplexity", "--help").decode())
    assert "must be >= 0, got -1" in refused(2, "perplexity", HELD_OUT, "--speculate", "-1")
