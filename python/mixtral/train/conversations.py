"""Examples to tune on, as token ids and which of them are scored: a JSON object a line, as mistral-finetune reads:

    {"messages": [{"role": "system" | "user" | "assistant", "content": "...", "weight": 0 | 1}, ...]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

Of conversations the assistant's answers are scored, with the token that ends them, but for those of weight 0; with
"only_last": true the last one alone. A "system_prompt" beside the messages is one more message in front. Of a pair the
completion is scored, of a text all. "interactions" is another word for "messages", "content" for "text".
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..tokenizer import Tokenizer, common_prefix

_SHOWN_ERRORS = 3
_ROLES = ("system", "user", "assistant")


@dataclass
class Document:
    """One sequence.

    Attributes:
        ids: token ids [T].
        scored: bool [T], the ids that the model learns to predict; never the first.
    """

    ids: list[int]
    scored: list[bool]


class ExampleError(ValueError):
    """Lines that are no examples: the message names the file, the line and the reason."""


def read_examples(path: str | Path, tokenizer: Tokenizer, chat_template: str | None = None) -> list[list[Document]]:
    """The documents of every line: mostly one, or one for each answer (``encode_messages``). Empty lines are left out.

    Raises:
        ExampleError: a line is wrong, or there is none.
        OSError: the file cannot be read.
    """
    examples, errors = [], []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            examples.append(encode_example(_object(line), tokenizer, chat_template))
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
    if errors:
        more = len(errors) - _SHOWN_ERRORS
        raise ExampleError("; ".join(errors[:_SHOWN_ERRORS]) + (f"; and {more} more lines" if more > 0 else ""))
    if not examples:
        raise ExampleError(f"{path}: holds no example: expected a JSON object a line")
    return examples


def encode_example(example: dict, tokenizer: Tokenizer, chat_template: str | None = None) -> list[Document]:
    """The documents of one object.

    Raises:
        ValueError: what is wrong with it.
    """
    if "messages" in example or "interactions" in example:
        messages, scored = _messages(example)
        return encode_messages(messages, scored, tokenizer, chat_template)
    if "prompt" in example or "completion" in example:
        prompt, completion = _text(example, "prompt"), _text(example, "completion")
        if not completion:
            raise ValueError("completion must not be empty")
        ids = tokenizer.encode(prompt + completion, add_bos=True, add_eos=True)
        begin = common_prefix(tokenizer.encode(prompt, add_bos=True), ids)
        return [Document(ids, [i >= begin for i in range(len(ids))])]
    if "text" in example or "content" in example:
        ids = tokenizer.encode(_text(example, _one_of(example, "text", "content")), add_bos=True, add_eos=True)
        return [Document(ids, [i > 0 for i in range(len(ids))])]
    keys = ", ".join(map(str, example)) or "none"
    raise ValueError(f"expected the key messages, text, or prompt and completion, got {keys}")


def encode_messages(
    messages: Sequence[dict[str, str]], scored: Sequence[bool], tokenizer: Tokenizer, chat_template: str | None = None
) -> list[Document]:
    """A conversation as the model sees it when it answers.

    One document where each prompt goes on from the answer before it. Some formats change what came before (Mistral v3
    has the system prompt in front of the last user message): then there is one for each scored answer.

    Args:
        scored: bool [len(messages)], which answers count.
    """
    documents: list[Document] = []
    for last, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if last + 1 < len(messages) and messages[last + 1]["role"] == "assistant":
            raise ValueError(f"message {last + 1}: two answers in a row")
        ids, begin = tokenizer.encode_answer(messages[: last + 1], chat_template)
        known = documents[-1] if documents else Document([], [])
        goes_on = ids[: len(known.ids)] == known.ids
        marks = (known.scored if goes_on else []) + [False] * len(ids)
        marks = marks[: len(ids)]
        if scored[last]:
            marks[begin:] = [True] * (len(ids) - begin)
        if goes_on and documents:
            documents[-1] = Document(ids, marks)
        else:
            documents.append(Document(ids, marks))
    return [document for document in documents if any(document.scored)]


def _messages(example: dict) -> tuple[list[dict[str, str]], list[bool]]:
    """The messages, and which of them are scored."""
    for key in ("tools", "available_tools"):
        if example.get(key):
            raise ValueError(f"{key}: tools are not supported")
    given = example[_one_of(example, "messages", "interactions")]
    if not isinstance(given, list) or not given:
        raise ValueError("messages must be a list, and not empty")
    messages = [_message(index, message) for index, message in enumerate(given)]
    if "system_prompt" in example:
        if any(message["role"] == "system" for message in messages):
            raise ValueError("system_prompt goes without a message of the role system")
        messages.insert(0, {"role": "system", "content": _text(example, "system_prompt"), "weight": 0})
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, got {messages[-1]['role']}")
    scored = [message.pop("weight") == 1 for message in messages]
    if example.get("only_last", False) is True:
        scored = [False] * (len(scored) - 1) + scored[-1:]
    if not any(scored):
        raise ValueError("no answer counts: every weight is 0")
    return messages, scored


def _message(index: int, message: object) -> dict:
    """Role, content and weight: 1 where the answer is scored."""
    where = f"message {index}"
    if not isinstance(message, dict):
        raise ValueError(f"{where}: must be an object")
    if message.get("tool_calls"):
        raise ValueError(f"{where}: tool calls are not supported")
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where}: role must be system, user or assistant, got {json.dumps(role)}")
    try:
        content = _text(message, _one_of(message, "content", "text"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    weight = message.get("weight", 1)
    if weight is None:
        weight = 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{where}: weight must be 0 or 1, got {json.dumps(weight)}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"{where}: the answer must not be empty")
    return {"role": role, "content": content, "weight": int(weight) if role == "assistant" else 0}


def _object(line: bytes) -> dict:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _one_of(object_: dict, first: str, second: str) -> str:
    """The key that is there: one of two words for the same."""
    present = [key for key in (first, second) if object_.get(key) is not None]
    if len(present) != 1:
        raise ValueError(f"must have {first} or {second}" + (", not both" if present else ""))
    return present[0]


def _text(object_: dict, key: str) -> str:
    value = object_.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text" + ("" if key in object_ else ", and is missing"))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half of a surrogate pair") from None
    return value


def split_held_out(examples: Sequence[list[Document]], every: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and those of every ``every``-th line, which are held out."""
    train = [document for i, example in enumerate(examples) if (i + 1) % every for document in example]
    return train, [document for i, example in enumerate(examples) if not (i + 1) % every for document in example]


def cut(documents: Sequence[Document], context: int) -> Iterator[Document]:
    """The first ``context`` tokens of each; a document is left out where none of them is scored."""
    for document in documents:
        if any(document.scored[:context]):
            yield Document(document.ids[:context], document.scored[:context])
