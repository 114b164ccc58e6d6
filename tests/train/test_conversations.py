"""JSONL of conversations, pairs and texts: exactly which tokens are scored, and what is wrong with a line."""

import json
import shutil
from pathlib import Path

import pytest

import mixtral
from binary import DEMO
from mixtral.train.conversations import Document, ExampleError, cut, encode_example, read_examples, split_held_out

TOKENIZER = mixtral.Tokenizer(DEMO)
TURNS = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Nothing more."},
]
SYSTEM = {"role": "system", "content": "Be kind."}
FORMATS = [None, "mistral-v1", "chatml", "zephyr", "llama-2", "alpaca", "vicuna"]


def encode(example: dict, chat_template: str | None = None) -> list[Document]:
    return encode_example(example, TOKENIZER, chat_template)


def scored_runs(document: Document) -> list[tuple[int, int]]:
    """(begin, end) of each run of scored tokens."""
    edges = [i for i in range(1, len(document.scored)) if document.scored[i] != document.scored[i - 1]]
    edges += [len(document.scored)] * document.scored[-1]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_a_conversation_by_hand() -> None:
    """The bundled model's format: <s>[INST] user [/INST] answer</s>, and so on."""
    (document,) = encode({"messages": TURNS})
    pieces = [TOKENIZER.piece(i) for i in document.ids]
    assert "".join(pieces).replace("▁", " ").replace("<0x0A>", "\n") == (
        "<s> [INST] Hi there [/INST] Hello you</s> [INST] And then? [/INST] Nothing more.</s>"
    )
    scored = ["".join(pieces[a:b]) for a, b in scored_runs(document)]
    assert scored == ["▁Hello▁you</s>", "▁Nothing▁more.</s>"]


@pytest.mark.parametrize("chat_template", FORMATS)
@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
def test_the_scored_tokens_are_what_the_model_writes_after_its_prompt(chat_template: str | None, system: bool) -> None:
    """For every format: the tokens before an answer are those of apply_chat, and the answer is scored with its end."""
    before = [SYSTEM] if system else []
    documents = encode({"messages": before + TURNS}, chat_template)
    # chatml ends an answer with a text that is no control token here: the end is </s>, as in no later prompt.
    assert len(documents) == (2 if chat_template == "chatml" else 1)
    runs = [(document.ids, *run) for document in documents for run in scored_runs(document)]
    assert len(runs) == 2
    for (ids, begin, end), turns in zip(runs, (1, 3), strict=True):
        assert ids[:begin] == TOKENIZER.apply_chat(before + TURNS[:turns], chat_template)
        assert TOKENIZER.decode(ids[begin:end]).strip() == TURNS[turns]["content"]
        assert ids[end - 1] == TOKENIZER.eos_id
        assert TOKENIZER.eos_id not in ids[begin : end - 1]


def test_a_format_that_changes_the_past_gives_a_document_for_each_answer(tmp_path: Path) -> None:
    """As Mistral v3, which puts the system prompt in front of the last user message."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, tmp_path / name)
    text = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {% if loop.index >= messages|length - 1 %}"
    text += "(kind) {% endif %}{{ m.content }} A:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(text)
    tokenizer = mixtral.Tokenizer(tmp_path)
    documents = encode_example({"messages": TURNS}, tokenizer)
    assert len(documents) == 2
    for document, turns in zip(documents, (1, 3), strict=True):
        ((begin, end),) = scored_runs(document)
        assert document.ids[:begin] == tokenizer.apply_chat(TURNS[:turns])
        assert end == len(document.ids)


def test_weights_and_only_last_choose_the_answers() -> None:
    (whole,) = encode({"messages": TURNS})
    first, last = scored_runs(whole)
    weighted = [dict(turn) for turn in TURNS]
    weighted[1]["weight"] = 0
    weighted[3]["weight"] = 1
    for example in ({"messages": weighted}, {"messages": TURNS, "only_last": True}):
        (document,) = encode(example)
        assert document.ids == whole.ids
        assert scored_runs(document) == [last]
    weighted[1]["weight"], weighted[3]["weight"] = 1, 0
    (document,) = encode({"messages": weighted})
    assert scored_runs(document) == [first]


def test_other_words_for_the_same() -> None:
    (expected,) = encode({"messages": [SYSTEM, *TURNS]})
    turns = [{"role": turn["role"], "text": turn["content"]} for turn in TURNS]
    assert encode({"interactions": turns, "system_prompt": "Be kind."}) == [expected]


def test_a_pair_scores_its_completion_and_a_text_all_of_it() -> None:
    (pair,) = encode({"prompt": "The king said", "completion": " that he was glad."})
    assert pair.ids == TOKENIZER.encode("The king said that he was glad.", add_bos=True, add_eos=True)
    prompt = TOKENIZER.encode("The king said", add_bos=True)
    assert scored_runs(pair) == [(len(prompt), len(pair.ids))]
    (text,) = encode({"text": "In the beginning"})
    assert text.ids == TOKENIZER.encode("In the beginning", add_bos=True, add_eos=True)
    assert scored_runs(text) == [(1, len(text.ids))]
    assert encode({"content": "In the beginning"}) == [text]


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


WRONG = [
    ("{", "is no JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1]", "must be a JSON object"),
    ({"chat": 1}, "expected the key messages, text, or prompt and completion, got chat"),
    ({"messages": []}, "messages must be a list, and not empty"),
    ({"messages": TURNS, "interactions": TURNS}, "must have messages or interactions, not both"),
    (chat(("user", "Hi")), "the last message must be the assistant's, got user"),
    (chat(("user", "Hi"), ("bot", "Hello")), 'message 1: role must be system, user or assistant, got "bot"'),
    (chat(("user", "Hi"), ("assistant", " ")), "message 1: the answer must not be empty"),
    (chat(("user", "Hi"), ("assistant", "a"), ("assistant", "b")), "message 2: two answers in a row"),
    ({"messages": [{"role": "user"}, TURNS[1]]}, "message 0: must have content or text"),
    ({"messages": [{"role": "user", "content": 3}, TURNS[1]]}, "message 0: content must be a text"),
    ({"messages": [TURNS[0], {**TURNS[1], "weight": 2}]}, "message 1: weight must be 0 or 1, got 2"),
    ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "no answer counts: every weight is 0"),
    ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{}]}]}, "message 1: tool calls are not supported"),
    ({"messages": TURNS, "tools": [{}]}, "tools: tools are not supported"),
    ({"messages": [SYSTEM, *TURNS], "system_prompt": "x"}, "system_prompt goes without a message of the role system"),
    ({"prompt": "x"}, "completion must be a text, and is missing"),
    ({"prompt": "x", "completion": ""}, "completion must not be empty"),
    ({"text": None}, "must have text or content"),
    ({"text": "\ud800"}, "text holds half of a surrogate pair"),
    (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "user and assistant must speak in turn"),
]


@pytest.mark.parametrize("line, reason", WRONG, ids=[reason[:40] for _, reason in WRONG])
def test_a_wrong_line_is_named_with_its_reason(line: str | dict, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    good = json.dumps({"messages": TURNS})
    file.write_text(f"{good}\n\n{line if isinstance(line, str) else json.dumps(line)}\n{good}\n")
    with pytest.raises(ExampleError) as error:
        read_examples(file, TOKENIZER)
    assert str(error.value).startswith(f"{file}:3: ")
    assert reason in str(error.value)


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("{}\n" * 5)
    with pytest.raises(ExampleError, match=r":1: .*:2: .*:3: .*; and 2 more lines$"):
        read_examples(file, TOKENIZER)
    file.write_text("\n")
    with pytest.raises(ExampleError, match="holds no example"):
        read_examples(file, TOKENIZER)
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ExampleError, match=":1: is not UTF-8"):
        read_examples(file, TOKENIZER)


def test_held_out_lines_and_long_documents() -> None:
    examples = [[Document([1, i], [False, True])] for i in range(10)]
    train, held_out = split_held_out(examples, 4)
    assert [document.ids[1] for document in held_out] == [3, 7]
    assert len(train) == 8
    long = Document([1, 2, 3, 4], [False, False, True, True])
    assert [document.ids for document in cut([long], 3)] == [[1, 2, 3]]
    assert list(cut([long], 2)) == []
