"""`--prompt-cache`: a generation goes on from a file, to the same bits."""

from pathlib import Path

from binary import mixtral, ok_json

PROMPT = "Once upon a time there was a king who had three daughters. " * 3


def generate(prompt: str, *arguments: str | Path) -> dict:
    return ok_json("generate", "-p", prompt, "-n", "12", "--ignore-eos", "--logprobs", "2", *arguments)


def test_a_cached_prompt_is_not_computed_again_and_changes_no_bit(tmp_path):
    cache = tmp_path / "king.cache"
    without, first, second = generate(PROMPT), generate(PROMPT, "--prompt-cache", cache), None
    assert first["timings"]["cached_tokens"] == 0
    second = generate(PROMPT, "--prompt-cache", cache)
    read = len(first["prompt_token_ids"]) - 1  # one token is needed for the logits
    assert second["timings"]["cached_tokens"] == read // 16 * 16 > 0  # full pages
    for result in (first, second):
        assert result["token_ids"] == without["token_ids"] and result["logprobs"] == without["logprobs"]


def test_a_longer_prompt_goes_on_from_the_common_prefix(tmp_path):
    cache = tmp_path / "king.cache"
    generate(PROMPT, "--prompt-cache", cache)
    longer = generate(PROMPT + "The eldest", "--prompt-cache", cache)
    assert 16 <= longer["timings"]["cached_tokens"] < len(longer["prompt_token_ids"])
    assert longer["logprobs"] == generate(PROMPT + "The eldest")["logprobs"]


def assert_refused(cache: Path, *arguments: str) -> str:
    before = cache.read_bytes()
    run = mixtral("generate", "-p", "a", "-n", "2", "--prompt-cache", cache, *arguments)
    assert run.returncode == 3 and run.stdout == b"" and run.stderr.count(b"\n") == 1
    assert cache.read_bytes() == before
    return run.stderr.decode()


def test_the_file_of_another_type_or_a_damaged_one_is_refused(tmp_path):
    cache = tmp_path / "a.cache"
    generate(PROMPT, "--prompt-cache", cache)
    assert "another model, type or device" in assert_refused(cache, "--dtype", "int8")
    cache.write_bytes(cache.read_bytes()[:-1])
    assert "a.cache" in assert_refused(cache)
    cache.write_text("not a cache, but a text of some length")
    assert "a.cache" in assert_refused(cache)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    run = mixtral("generate", "-p", "a", "-n", "2", "--prompt-cache", tmp_path / "no" / "a.cache")
    assert run.returncode == 5 and b"a.cache" in run.stderr
    assert list(tmp_path.iterdir()) == []
