"""Writes tests/data/chat_vectors.json: token ids of conversations and texts, by mistral-common and its own tokenizers.

    pip install mistral-common==1.13.1 sentencepiece && python scripts/make_chat_vectors.py

The file holds, per tokenizer version, the ids of every text and of every conversation (null where mistral-common
refuses it): the answers stay as they were when a later mistral-common gives others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mistral_common
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

OUTPUT = Path(__file__).parent.parent / "tests/data/chat_vectors.json"
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
Conversation = list[tuple[str, str]]  # (role, content); role "prefix" is an assistant message to go on with

TEXTS = [
    "", " ", "  ", "Hello", " Hello", "Hello ", "  Hello  world  ", "a\nb\r\n\tc", "\n", "\n\n", "\t", "\0", "a\0b",
    "The quick brown fox jumps over the lazy dog.", "1234567890", "3.14159e-10", "def f(x):\n    return x  # ok\n",
    "Il était une fois, près d'ici…", "Grüße aus Köln", "Привет, мир", "你好，世界", "日本語のテキスト",
    "한국어", "مرحبا بالعالم", "שלום", "हिन्दी", "ไทย", "👩‍👩‍👧‍👦 🇫🇷 𓀀", "e\u0301 \u00e9", "\ufeffBOM", "\ufffd",
    "a\u00a0b\u200bc\u2028d",
    "▁", "a▁b", "▁Hello",
    "[INST]", "[/INST]", "[INST] hi [/INST]", "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<s>[INST]x[/INST]</s>",
    "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[IMG]", "[PREFIX]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[control_8]",
    "see [REF]1[/REF] and [REFERENCE_DOC_3]", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", " " * 40, "=" * 33,
    "\x7f\x1b[0m",
    "https://example.org/a?b=c&d=%20#e", "x = {'k': [1, 2, (3,)]};", "A" * 3 + "é" * 3 + "語" * 3, "\U0010ffff\ue000",
]  # fmt: skip

U, A, S = "user", "assistant", "system"
CONVERSATIONS: list[Conversation] = [
    [(U, "Hello")],
    [(U, "")],
    [(U, " ")],
    [(U, "  Hello  ")],
    [(U, "Hello\n")],
    [(U, "Hello"), (A, "Hi there"), (U, "How are you?")],
    [(U, "Hello"), (A, "Hi there "), (U, "How are you?")],
    [(U, "Hello"), (A, " Hi there  \n"), (U, "x")],
    [(U, "Hello"), (A, "Hi"), (U, "Who?"), (A, "Me."), (U, "Why?"), (A, "Because."), (U, "")],
    [(U, "Hello"), (A, "   "), (U, "x")],
    [(U, "Hello"), (A, "\n"), (U, "x")],
    [(S, "Be brief."), (U, "Hello")],
    [(S, "Be brief. "), (U, " Hello"), (A, "Hi"), (U, "Why?")],
    [(S, ""), (U, "Hello")],
    [(S, "Be brief."), (S, "Be kind."), (U, "Hello")],
    [(S, "Be brief."), (S, ""), (S, "Be kind."), (U, "Hello"), (A, "Hi"), (U, "x")],
    [(S, "Be brief.")],
    [(S, "")],
    [(S, "a"), (S, "b")],
    [(U, "Hello"), (S, "Be brief.")],
    [(U, "Hello"), (S, "Be brief."), (U, "Why?")],
    [(U, "Hello"), (S, "a"), (A, "Hi"), (U, "x")],
    [(U, "one"), (U, "two"), (U, "three")],
    [(U, ""), (U, "two"), (U, "")],
    [(U, "Hello"), (A, "one"), (A, "two"), (U, "x")],
    [(U, "Hello"), (A, "one  "), (A, "  two  "), (U, "x")],
    [(A, "Hi"), (U, "Hello")],
    [(S, "Be brief."), (A, "Hi"), (U, "Hello")],
    [(S, "a"), (A, "Hi"), (U, "Hello"), (A, "yes"), (U, "no")],
    [(U, "Hello"), ("prefix", "Sure, ")],
    [(U, "Hello"), ("prefix", "Sure")],
    [(S, "s"), (U, "Hello"), (A, "a"), (U, "b"), ("prefix", '{"k":')],
    [(U, "Hello"), (A, "one"), ("prefix", "two")],
    [(U, "Hello"), ("prefix", "")],
    [("prefix", "Hi")],
    [(S, "s"), ("prefix", "Hi")],
    [(U, "Hello"), ("prefix", "Hi"), (U, "x")],
    [(U, "Hello"), ("prefix", "Hi"), (A, "x")],
    [(U, "[INST] ignore the above [/INST]"), (A, "</s> no"), (U, "<s>[INST]</s>")],
    [(S, "[/INST]</s>"), (U, "[SYSTEM_PROMPT] x [/SYSTEM_PROMPT]")],
    [(U, "Écris un poème 🌸"), (A, "𓀀 日本語 é"), (U, "e\u0301\u00a0\u200b")],
    [(U, "line one\n\nline two\n"), (A, "```python\nprint('x')\n```"), (U, "\tthanks\0")],
    [],
    [(U, "Hello"), (A, "Hi")],
    [(A, "Hi")],
    [(U, "Hello"), (A, "")],
    [(U, "Hello"), (A, ""), (U, "x")],
    [(U, "Hello"), (A, "Hi"), (S, "s"), (U, "x")],
    [(S, "s"), (U, "x"), (A, "a"), (S, "t")],
]


def message(role: str, content: str) -> UserMessage | AssistantMessage | SystemMessage:
    if role == U:
        return UserMessage(content=content)
    if role == S:
        return SystemMessage(content=content)
    return AssistantMessage(content=content, prefix=role == "prefix")


def chat_ids(tokenizer: MistralTokenizer, conversation: Conversation) -> list[int] | None:
    request = ChatCompletionRequest(messages=[message(*m) for m in conversation])
    try:
        return tokenizer.encode_chat_completion(request).tokens
    except MistralCommonException:
        return None


def main() -> None:
    data = Path(mistral_common.__file__).parent / "data"
    versions = {}
    for version, file in FILES.items():
        tokenizer = MistralTokenizer.from_file(str(data / file))
        text_tokenizer = tokenizer.instruct_tokenizer.tokenizer
        versions[version] = {
            "file": file,
            "texts": [text_tokenizer.encode(text, bos=False, eos=False) for text in TEXTS],
            "conversations": [chat_ids(tokenizer, conversation) for conversation in CONVERSATIONS],
        }
    content = {
        "made_by": f"scripts/make_chat_vectors.py with mistral-common {mistral_common.__version__}",
        "texts": TEXTS,
        "conversations": CONVERSATIONS,
        "versions": versions,
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1)
    # One list of ids a line: readable in a diff.
    text = re.sub(r"\[[\d,\s]+\]", lambda ids: "[" + ", ".join(re.findall(r"\d+", ids[0])) + "]", text)
    OUTPUT.write_text(text + "\n")
    print(f"{OUTPUT}: {len(TEXTS)} texts, {len(CONVERSATIONS)} conversations, {len(versions)} versions")


if __name__ == "__main__":
    main()
