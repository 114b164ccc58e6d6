"""A fine-tune of the demo model with added tokens and tokenizer.json alone: tokenize, generate, --logprobs, --stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from binary import DEMO, edit_config, mixtral, ok, ok_json

START, END, NOTE, EMPTY = 4096, 4097, 4098, 4099  # the last has no token
PROMPT = "Once upon a time"


def fine_tune(folder: Path, likely: tuple[int, int] | None = None) -> Path:
    """The demo model with three added tokens and one id to spare; with ``likely`` it says only these two."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:4])])
    if likely:
        # A vector and its opposite: whatever the hidden state, one of their two logits is at least 0, all others are 0.
        weights["lm_head.weight"].zero_()
        direction = torch.randn(weights["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(1))
        for token, sign in zip(likely, (1, -1), strict=True):
            weights["lm_head.weight"][token] = sign * direction
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, vocab_size=4100)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token, text in ((START, "<|im_start|>"), (END, "<|im_end|>"), (NOTE, "[note]")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": token, "content": text, "special": token != NOTE, **flags})
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(tmp_path_factory.mktemp("added") / "model")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(tmp_path_factory.mktemp("speaker") / "model", (END, EMPTY))


def test_tokenizer_json_alone_gives_the_same_text(model: Path) -> None:
    for flags in ((), ("--json", "--logprobs", "2")):
        here, there = (ok("generate", m, "-p", PROMPT, "-n", "8", *flags) for m in (model, DEMO))
        if flags:
            here, there = (json.loads(output)["token_ids"] for output in (here, there))
        assert here == there
    assert ok("chat", model, "-n", "4", "--temp", "0", stdin=b"Hello\n") == ok(
        "chat", DEMO, "-n", "4", "--temp", "0", stdin=b"Hello\n"
    )


def test_tokenize_reads_special_tokens_where_asked(model: Path) -> None:
    text = "<|im_end|>[note]a"
    asked = ok_json("tokenize", model, "-p", text, "--parse-special", "--explain")
    assert asked["token_ids"][1:3] == [END, NOTE] and asked["left_as_text"] == []
    plain = ok_json("tokenize", model, "-p", text, "--explain")
    assert END not in plain["token_ids"] and NOTE in plain["token_ids"]
    assert plain["left_as_text"] == [{"token_id": END, "piece": "<|im_end|>"}]
    explained = ok("tokenize", model, "-p", text + "</s>", "--explain").decode()
    assert "left as text: <|im_end|> (4097), </s> (2); --parse-special makes control tokens of them\n" in explained
    assert "left as text" not in ok("tokenize", model, "-p", "a", "--explain").decode()
    assert "4098  [note]  [5b 6e 6f 74 65 5d]\n" in explained


def test_added_tokens_have_names_and_ids_without_a_token_none(speaker: Path) -> None:
    run = ok_json("generate", speaker, "-p", PROMPT, "-n", "6", "--logprobs", "3")
    assert set(run["token_ids"]) <= {END, EMPTY} and run["text"] == ""
    names = {entry["token_id"]: entry["piece"] for token in run["logprobs"] for entry in (token, *token["top"])}
    assert names[END] == "<|im_end|>" and names[EMPTY] == ""


def test_a_control_token_stops_by_its_name(tmp_path: Path) -> None:
    for token, name in ((END, "<|im_end|>"), (NOTE, "[note]")):
        speaker = fine_tune(tmp_path / name, (EMPTY, token))
        free = ok_json("generate", speaker, "-p", PROMPT, "-n", "16")
        assert free["finish_reason"] == "length" and token in free["token_ids"]
        assert free["text"] == ("" if token == END else "[note]" * free["token_ids"].count(NOTE))
        run = ok_json("generate", speaker, "-p", PROMPT, "-n", "16", "--stop", name)
        assert run["finish_reason"] == "stop" and run["text"] == ""
        # A control token that stops is left out, as an end-of-sequence token is.
        before = free["token_ids"][: free["token_ids"].index(token) + (token == NOTE)]
        assert run["token_ids"] == before


def test_generate_reads_special_tokens_where_asked(model: Path) -> None:
    plain, asked = (ok_json("generate", model, "-p", "a<|im_end|>", "-n", "1", *f) for f in ((), ("--parse-special",)))
    assert END not in plain["prompt_token_ids"] and asked["prompt_token_ids"][-1] == END


def test_files_that_disagree_are_told_in_one_line(model: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(model, both)
    shutil.copy(DEMO / "tokenizer.model", both)
    assert ok("tokenize", both, "-p", "[note]") == ok("tokenize", model, "-p", "[note]")
    (both / "added_tokens.json").write_text(json.dumps({"<x>": 300}))
    run = mixtral("tokenize", both, "-p", "a")
    assert run.returncode == 0
    assert run.stderr == b'mixtral: warning: the added token "<x>" (300) does not fit the vocabulary\n'


def test_python_reads_the_same_folder(speaker: Path, tmp_path: Path) -> None:
    import mixtral as package

    model = package.Mixtral.from_pretrained(speaker)
    result = model.generate(PROMPT, max_tokens=4)[0]
    assert set(result.token_ids) <= {END, EMPTY} and model.tokenizer.decode(result.token_ids) == result.text == ""
    assert model.tokenizer.encode("<|im_end|>", parse_special=True) == [END]

    other = tmp_path / "other"
    shutil.copytree(speaker, other)
    (other / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.warns(UserWarning, match="the model has no tokenizer: .*is a Unigram tokenizer"):
        model = package.Mixtral.from_pretrained(other)
    assert model.tokenizer is None and len(model.generate([1, 5], max_tokens=2)[0].token_ids) == 2
