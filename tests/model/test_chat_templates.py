"""Chats by the template of the folder: the ids of transformers, from Python and from the binary's own renderer."""

from __future__ import annotations

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import jinja2
import mistral_common
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

import mixtral
from chat_templates import TEMPLATES, WITH_CONTROL_TOKENS, conversation
from mixtral import _C, chat_template
from test_tokenizer_json import converted

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
CASES = [(name, number) for name, templates in TEMPLATES.items() for number in range(len(templates))]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """Name of a vocabulary -> a folder that transformers saved, with ChatML's tokens, and its tokenizer there."""

    @cache
    def saved(version: str):
        folder = tmp_path_factory.mktemp(version)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        theirs = PreTrainedTokenizerFast(tokenizer_object=converted(version), **names)
        theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        theirs.save_pretrained(folder)
        return folder, theirs

    return saved


def ids_of(theirs, template: str, messages: list[dict]) -> list[int] | None:
    """None where the template refuses."""
    try:
        return theirs.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
    except jinja2.TemplateError:
        return None


def or_none(function, *arguments):
    try:
        return function(*arguments)
    except ValueError:
        return None


@pytest.mark.parametrize("name, number", CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_ids_are_those_of_transformers(folders, tmp_path: Path, name: str, number: int) -> None:
    folder, theirs = folders("v1")
    template = TEMPLATES[name][number]
    file = tmp_path / "template.jinja"
    file.write_text(template, newline="")
    ours = mixtral.Tokenizer(folder)
    binary = _C.ChatFormat(folder, ours, str(file))
    rng = random.Random(name + str(number))
    answered = 0
    count = 200 if number == 0 else 50
    for _ in range(count):
        messages = conversation(rng)
        expected = ids_of(theirs, template, messages)
        assert or_none(binary.encode, messages) == expected, messages
        assert or_none(ours.apply_chat, messages, template) == expected, messages
        answered += expected is not None
    assert answered >= count / 3
    same = number == 0 or (name, number) in (("chatml", 1), ("chatml", 2))
    assert binary.name == (name if same else "custom")


def test_templates_with_control_tokens_and_tools(folders, tmp_path: Path) -> None:
    folder, theirs = folders("v3")
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(WITH_CONTROL_TOKENS)
    ours = mixtral.Tokenizer(model)
    binary = _C.ChatFormat(model, ours)
    rng = random.Random(3)
    for _ in range(200):
        messages = conversation(rng)
        expected = ids_of(theirs, WITH_CONTROL_TOKENS, messages)
        assert binary.encode(messages) == ours.apply_chat(messages) == expected, messages


def test_a_format_is_recognized_by_what_it_renders(folders, tmp_path: Path) -> None:
    """Two ways of writing ChatML have one name; one more space, or a default system message, is another format."""
    folder, _ = folders("v1")
    tokenizer = mixtral.Tokenizer(folder)

    def name_of(template: str) -> str:
        (tmp_path / "template").write_text(template)
        return _C.ChatFormat(folder, tokenizer, str(tmp_path / "template")).name

    for name, templates in TEMPLATES.items():
        assert name_of(templates[0]) == name
    assert name_of(TEMPLATES["chatml"][1]) == "chatml"
    assert name_of(TEMPLATES["chatml"][0].replace("'<|im_end|>'", "' <|im_end|>'")) == "custom"
    assert name_of(TEMPLATES["chatml"][3]) == "custom"
    assert name_of(TEMPLATES["zephyr"][0].replace("message['content']", "message.content.strip()")) == "custom"


@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama-2", "alpaca", "vicuna"])
def test_formats_by_name(folders, name: str) -> None:
    folder, theirs = folders("v1")
    ours = mixtral.Tokenizer(folder)
    binary = _C.ChatFormat(folder, ours, name)
    rng = random.Random(name)
    for _ in range(50):
        messages = conversation(rng)
        expected = ids_of(theirs, TEMPLATES[name][0], messages)
        assert or_none(binary.encode, messages) == or_none(ours.apply_chat, messages, name) == expected, messages


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistral_formats_by_name_need_their_control_tokens(folders, version: str) -> None:
    folder, _ = folders(version)
    tokenizer = mixtral.Tokenizer(folder)
    file = mixtral.Tokenizer(DATA / FILES[version])
    assert tokenizer.apply_chat(HELLO, f"mistral-{version}") == file.apply_chat(HELLO)
    missing = {"v1": "mistral-v3", "v3": "mistral-v7"}[version]
    with pytest.raises(ValueError, match=f"{missing}: the tokenizer has none of its control tokens"):
        tokenizer.apply_chat(HELLO, missing)
    with pytest.raises(ValueError, match="must be a file or one of mistral-v1, .*chatml.*got nothing"):
        tokenizer.apply_chat(HELLO, "nothing")


def test_where_a_template_comes_from(folders, tmp_path: Path) -> None:
    """chat_template.jinja, then tokenizer_config.json: as transformers reads what it and its older versions wrote."""
    folder, theirs = folders("v1")
    model = shutil.copytree(folder, tmp_path / "model")

    def check(text: str) -> None:
        ours = mixtral.Tokenizer(model)
        expected = AutoTokenizer.from_pretrained(model).apply_chat_template(HELLO, return_dict=False)
        assert ours.apply_chat(HELLO) == _C.ChatFormat(model, ours).encode(HELLO) == expected
        assert expected == theirs.encode(text, add_special_tokens=False)

    config = json.loads((model / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default of a list"}]
    for value, text in (("one text", "one text"), (several, "default of a list")):
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        check(text)
    theirs_here = AutoTokenizer.from_pretrained(model)
    theirs_here.chat_template = {"default": "from a file", "tool_use": "tools"}
    theirs_here.save_pretrained(model)
    assert (model / "additional_chat_templates").is_dir()
    check("from a file")
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several[:1]}))
    (model / "chat_template.jinja").unlink()
    with pytest.raises(mixtral.LoadError, match='tokenizer_config.json: chat_template: .* named "default"'):
        mixtral.Tokenizer(model).apply_chat(HELLO)


def test_special_tokens_are_the_templates_variables(folders, tmp_path: Path) -> None:
    folder, _ = folders("v1")
    model = shutil.copytree(folder, tmp_path / "model")
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ unk_token }}|{{ messages[0].content }}"
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "eos_token": {"content": "<|im_end|>"}, "unk_token": None}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<unk>"}))
    ours = mixtral.Tokenizer(model)
    expected = ours.encode("<s>|<|im_end|>|True||Hello", parse_special=True)
    assert ours.apply_chat(HELLO) == _C.ChatFormat(model, ours).encode(HELLO) == expected


def test_going_on_with_an_answer(folders) -> None:
    folder, theirs = folders("v1")
    ours = mixtral.Tokenizer(folder)
    for name in ("chatml", "llama-2", "vicuna"):
        for answer in ("Well,", "Well, ", "\n a"):
            messages = [*HELLO, {"role": "assistant", "content": answer}]
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name][0], continue_final_message=True, return_dict=False
            )
            messages[-1]["prefix"] = True
            assert ours.apply_chat(messages, name) == expected
            assert _C.ChatFormat(folder, ours, name).encode(messages) == expected
    with pytest.raises(ValueError, match="does not show the message that the model is to go on with"):
        ours.apply_chat([*HELLO, {"role": "assistant", "content": "x", "prefix": True}], "{{ messages[0].content }}")


def test_a_base_model_says_so(folders, tmp_path: Path) -> None:
    folder, _ = folders("v1")
    model = shutil.copytree(folder, tmp_path / "model")
    expected = mixtral.Tokenizer(DATA / FILES["v1"]).apply_chat(HELLO)
    assert mixtral.Tokenizer(model).apply_chat(HELLO) == expected  # no config.json: perhaps Mistral's own layout
    (model / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no chat template: it is a base model.*--chat-template mistral-v1"):
        mixtral.Tokenizer(model).apply_chat(HELLO)
    assert mixtral.Tokenizer(model).apply_chat(HELLO, "mistral-v1") == expected


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "2 seconds|more work"),
        (
            "{% for a in range(99999) %}{{ messages[0].content * 10000 }}{% endfor %}",
            "16 MiB|not supported|of a string",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "512 MiB|16 MiB",
        ),
        ("{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = [n.x] %}{% endfor %}x", None),
        ("{{ ''.__class__.__mro__ }}", "unsafe|not supported"),
        ("{{ messages[0].content", "end"),
        ("{% include 'x' %}", "no loader|not supported"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested|recursion|line|ended"),
        ("{{ messages" + ".x" * 30000 + " }}", "nested|undefined|recursion|ended|seconds"),
    ],
)
def test_hostile_templates_end_in_an_error(folders, template: str, reason: str | None) -> None:
    folder, _ = folders("v1")
    tokenizer = mixtral.Tokenizer(folder)
    for render in (
        lambda: tokenizer.apply_chat(HELLO, template),
        lambda: _C.ChatTemplate(template, "file").render(HELLO, {}),
    ):
        if reason is None:  # either renders or refuses, and does not fall over
            try:
                render()
            except mixtral.LoadError:
                pass
            continue
        with pytest.raises(mixtral.LoadError, match=reason) as error:
            render()
        assert error.value.item == "chat_template"
    assert tokenizer.apply_chat(HELLO, "{{ messages[0].content }}") == tokenizer.encode("Hello")


def test_threads_forks_and_a_dead_process(folders) -> None:
    """The process that renders serves all threads, and one that somebody ended is replaced; a fork starts its own."""
    tokenizer = mixtral.Tokenizer(folders("v1")[0])

    def ids(number: int) -> list[int]:
        return tokenizer.apply_chat([{"role": "user", "content": str(number)}], "{{ messages[0].content * 3 }}")

    expected = [tokenizer.encode(str(number) * 3) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ids, range(40))) == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if [ids(number) for number in range(5)] == expected[:5] else 1)
    assert [ids(number) for number in range(40)] == expected
    assert os.waitpid(child, 0)[1] == 0
    chat_template._worker._process.kill()
    chat_template._worker._process.wait()
    assert ids(7) == expected[7]


def random_template(rng: random.Random) -> str:
    """Any mixture of what chat templates are made of."""
    tests = ["defined", "none", "string", "mapping", "iterable", "odd", "true", "equalto(1)", "not defined"]
    operators = ["+", "~", "==", "!=", "and", "or", "<", "%", "-", "in", "not in"]
    filters = ["trim", "length", "upper", "first", "last", "list", "default('z', true)", "join(',')", "string",
               "replace('a', 'bb')", "map(attribute='role')|list",
               "selectattr('role', 'equalto', 'user')|list"]  # fmt: skip
    methods = ["strip()", "lstrip()", "rstrip()", "split()[0]", "split('e', 1)[-1]", "title()", "startswith(' ')"]
    leaves = ["messages", "m", "loop", "bos_token", "tools", "x", "'a'", '"b\\n"', "1", "0", "true", "none", "[]",
              "range", "m.content", "m['role']", "loop.index0", "loop.last", "ns.x", "missing"]  # fmt: skip

    def value(depth: int = 0) -> str:
        if depth > 2 or rng.random() < 0.3:
            return rng.choice(leaves)
        one = value(depth + 1)
        return rng.choice(
            [
                f"{one} {rng.choice(operators)} {value(depth + 1)}",
                f"({one} if {value(depth + 1)} else {value(depth + 1)})",
                f"{one}[{rng.choice(['0', '-1', '1:', ':1', '::-1', '-2:'])}]",
                f"{one} | {rng.choice(filters)}",
                f"{one} is {rng.choice(tests)}",
                f"m.content.{rng.choice(methods)}",
                f"not {one}",
                f"[{one}, 'user']",
            ]
        )

    def tag(text: str) -> str:
        return "{%" + rng.choice([" ", " ", "- ", "+ "]) + text + rng.choice([" ", " ", " -", " +"]) + "%}"

    def block(depth: int = 0, loop: bool = False) -> str:
        inner = "".join(block(depth + 1, loop) for _ in range(rng.randint(1, 2))) if depth < 3 else "x"
        return rng.choice(
            [
                rng.choice(["a", " b ", "\n", "\n  ", "\r\n\n c", "{# d #}\n", "{#- e -#}  "]),
                "{{" + rng.choice([" ", "- "]) + value() + rng.choice([" ", " -"]) + "}}",
                "{{ m.content }}",
                tag(f"if {value()}") + inner + tag("else") + "y" + tag("endif"),
                tag(f"for m in messages{rng.choice(['', '[1:]', ' if m.content'])}")
                + "".join(block(depth + 1, True) for _ in range(2 if depth < 3 else 0))
                + tag("endfor"),
                tag(f"set x = {value()}"),
                tag("set ns = namespace(x=0)")
                + tag("for m in messages")
                + tag(f"set ns.x = {value(2)}")
                + tag("endfor"),
                tag("set x") + inner.replace("break", "set x = 1").replace("continue", "set x = 2") + tag("endset"),
                tag(rng.choice(["break", "continue"])) if loop else "z",
            ]
        )

    return "".join(block() for _ in range(rng.randint(1, 5)))


def test_the_binary_renders_as_jinja_or_refuses() -> None:
    rng = random.Random(7)
    rendered = 0
    for _ in range(300):
        template, messages = random_template(rng), conversation(rng)
        try:
            ours = _C.ChatTemplate(template, "file").render(messages, {"bos_token": "<s>"})
        except (mixtral.LoadError, ValueError):
            continue
        theirs = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, bos_token="<s>")
        assert ours == theirs[0][0], template
        rendered += 1
    assert rendered > 60
