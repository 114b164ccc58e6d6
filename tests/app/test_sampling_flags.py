"""Flags of `mixtral generate` for penalties, bias, stops, samples and log-probabilities of the prompt."""

import json

import pytest

from binary import environment, mixtral, ok, ok_json

ONCE = ("generate", "-p", "Once upon a time", "-n", "20", "--ignore-eos")


def test_penalties_bias_and_stops_reach_the_sampler():
    plain = ok_json(*ONCE)["token_ids"]
    for flags in (["--presence-penalty", "2"], ["--frequency-penalty", "2"], ["--logit-bias", f"{plain[0]}=-100"]):
        assert ok_json(*ONCE, *flags)["token_ids"] != plain, flags
    always = ok_json(*ONCE, "--logit-bias", f"{plain[0]}=-100,{plain[1]}=-3", "--logit-bias", "300=100")
    assert always["token_ids"] == [300] * 20
    assert ok_json(*ONCE, env=environment(MIXTRAL_LOGIT_BIAS="7=-1,300=100"))["token_ids"] == [300] * 20

    stop = plain[5]
    stopped = ok_json(*ONCE, "--stop-token-ids", f"{stop},1")
    assert stopped["finish_reason"] == "stop" and stopped["token_ids"] == plain[: plain.index(stop)]
    later = ok_json(*ONCE, "--stop-token-ids", str(stop), "--min-tokens", "9")["token_ids"]
    assert len(later) >= 9 and stop not in later


def test_samples_are_a_line_each_and_differ():
    flags = [*ONCE, "--temp", "1.5", "--seed", "7", "--samples", "3"]
    lines = [json.loads(line) for line in ok(*flags, "--json").splitlines()]
    assert len({tuple(line["token_ids"]) for line in lines}) == 3
    assert lines[0]["token_ids"] == ok_json(*ONCE, "--temp", "1.5", "--seed", "7")["token_ids"]
    assert ok(*flags).decode() == "".join(line["text"] + "\n" for line in lines)
    assert {line["timings"]["new_tokens"] for line in lines} == {60}


def test_prompt_logprobs_are_one_for_each_token_of_the_prompt():
    result = ok_json(*ONCE, "--prompt-logprobs", "2")
    first, *others = result["prompt_logprobs"]
    assert first is None and [entry["token_id"] for entry in others] == result["prompt_token_ids"][1:]
    for entry in others:
        assert len(entry["top"]) == 2 and entry["logprob"] <= entry["top"][0]["logprob"] < 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--logit-bias", "x=1"], "--logit-bias must be ID=BIAS, for example 42=-100, got x=1"),
        (["--logit-bias", "7"], "--logit-bias must be ID=BIAS, for example 42=-100, got 7"),
        (["--logit-bias", "7=200"], "logit_bias must be in [-100, 100], got 200"),
        (["--presence-penalty", "3"], "presence_penalty must be in [-2, 2], got 3"),
        (["--min-tokens", "-1"], "min_tokens must be >= 0, got -1"),
        (["--samples", "0"], "--samples: must be >= 1, got 0"),
        (["--samples", "2", "--prompt-cache", "x"], "--samples excludes --prompt-cache"),
        (["--prompt-logprobs", "2"], "--prompt-logprobs requires --json"),
        (["--frequency_penalty", "1"], "use --frequency-penalty"),
    ],
)
def test_wrong_values_are_told_in_one_line(flags, words):
    run = mixtral("generate", "-p", "a", *flags)
    assert run.returncode == 2 and run.stdout == b""
    assert words in run.stderr.decode() and run.stderr.count(b"\n") == 1
