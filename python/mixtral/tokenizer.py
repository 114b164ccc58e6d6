"""The tokenizer for Python: that of C++, and chats by any Jinja template."""

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from . import _C
from .chat_template import Message, render
from .errors import LoadError
from .tool_messages import mistral_messages, mistral_tools


class Tokenizer(_C.Tokenizer):
    """The tokenizer of a model folder, or of one file: SentencePiece BPE, with added tokens."""

    def __init__(self, path: str | PathLike[str], version: str | None = None) -> None:
        """
        Args:
            path: a tokenizer.model, tokenizer.json or GGUF file, or a folder that holds one.
            version: "v1", "v2", "v3" or "v7", Mistral's; None: told by the file.

        Raises:
            LoadError: the file is missing or wrong.
            ValueError: an unknown version.
        """
        super().__init__(path, version)
        self._folder = Path(path)

    def apply_chat(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The prompt ids of a conversation, as transformers' ``apply_chat_template`` gives them.

        Args:
            messages: [{"role": "user", "content": "Hi"}, ...]. Roles are "system", "user", "assistant" and "tool"; a
                template may know more roles, and more keys. "prefix": True on the last message, an assistant's: the
                model goes on with it. Tool calls and their results are written as OpenAI's API has them.
            chat_template: "mistral-v1", "mistral-v2", "mistral-v3", "mistral-v7", "chatml", "zephyr", "llama-2",
                "alpaca", "vicuna", or a Jinja template, as its file or its text. None: the folder's, and where it has
                none Mistral's format for this tokenizer.
            tools: what the model may call, as OpenAI's API has it: [{"type": "function", "function": {"name": ...,
                "description": ..., "parameters": a JSON schema}}, ...]. Mistral's formats take tools since v2; a
                template gets them as its variable ``tools``.

        Raises:
            TypeError: messages that are not a list of dictionaries.
            ValueError: what the format refuses, with the message or the template's own words; an unknown name; the
                folder of a base model, without a template.
            LoadError: a template that is no Jinja, fails, or takes too much time or memory.
        """
        _check_form(messages)
        found = self._template(chat_template)
        if found is None:  # Mistral's formats are code: no template gives their ids for every text
            chat_format = _C.ChatFormat(self._folder, self, chat_template or "")
            version = chat_template.removeprefix("mistral-") if chat_template else self.version
            return chat_format.encode(mistral_messages(messages, version), mistral_tools(tools or []))
        _check(messages)
        return self._encode_template(found, messages, tools=tools)

    def tool_format(self, chat_template: str | None = None) -> str | None:
        """The name of the format of ``apply_chat`` in which a model with this chat format is shown tools.

        Returns:
            "mistral-v2", "mistral-v3" or "mistral-v7"; None where the chat format is v1, or not one of Mistral's.
        """
        try:
            name = _C.ChatFormat(self._folder, self, chat_template or "").name
        except (ValueError, LoadError):
            return None
        if not name.startswith("mistral-") or name == "mistral-v1" or not self.special_in("[TOOL_CALLS]"):
            return None
        # Chats of v2 and v3 look the same, and so do their templates: an explicit name alone knows better.
        return name if chat_template == name else f"mistral-{self.version}"

    def encode_answer(self, messages: Sequence[Message], chat_template: str | None = None) -> tuple[list[int], int]:
        """The ids of a conversation that ends with an answer, for training.

        Args:
            messages: as of ``apply_chat``; the last one is the assistant's, without prefix.
            chat_template: as of ``apply_chat``.

        Returns:
            The ids, with the token that ends an answer in this format, and how many of them are prompt: those that
            ``apply_chat`` gives for the messages before the last. Where a piece spans the end of the prompt and the
            beginning of the answer, it counts as answer.

        Raises:
            ValueError, LoadError: as of ``apply_chat``; ValueError where the last message is no answer.
        """
        *before, answer = messages
        if answer.get("role") != "assistant":
            raise ValueError(f"chat: message {len(before)}: the last role must be assistant, got {answer.get('role')}")
        prompt = self.apply_chat(before, chat_template)
        ids = self.apply_chat([*before, {**answer, "prefix": True}], chat_template)
        found = self._template(chat_template)
        if found is None:
            ids.append(self.eos_id)
        else:
            closed = self._encode_template(found, [*before, answer], closed=True)
            rest = closed[common_prefix(ids, closed) :]
            end = next((i for i, token in enumerate(rest) if self.is_control(token)), None)
            ids = [*ids, self.eos_id] if end is None else [*closed[: len(closed) - len(rest)], *rest[: end + 1]]
        return ids, common_prefix(prompt, ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the folder; None where it has none."""
        found = self._template(None)
        return found[0] if found else None

    def _encode_template(
        self,
        template: tuple[str, str],
        messages: Sequence[Message],
        closed: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        tokens = {"bos_token": self.piece(self.bos_id), "eos_token": self.piece(self.eos_id)}
        text = render(*template, list(messages), tokens | _C.special_token_texts(self._folder), closed, tools)
        return self.encode(text, parse_special=True)

    def _template(self, wanted: str | None) -> tuple[str, str] | None:
        """The text of the template and its file; None for a format that is code."""
        if wanted is None:
            return _C.find_chat_template(self._folder)
        if "{" in wanted:
            return wanted, "chat_template"
        if os.path.isfile(wanted):
            return Path(wanted).read_text(encoding="utf-8"), wanted
        named = _C.named_chat_templates()
        return (named[wanted], wanted) if wanted in named else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids are the same at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_form(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping):
        raise TypeError(f"apply_chat: messages must be a list of dictionaries, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"apply_chat: messages[{index}] must be a dictionary, got {type(message).__name__}")


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("chat: messages must not be empty")
    for index, message in enumerate(messages):
        if "role" not in message or "content" not in message:
            raise ValueError(
                f"apply_chat: messages[{index}] expected the keys role and content, got {', '.join(message)}"
            )
        last, assistant = index == len(messages) - 1, message["role"] == "assistant"
        if message.get("prefix") and not (last and assistant):
            raise ValueError(f"chat: message {index}: prefix must be set on the last message, an assistant's, only")
        if last and assistant and not message.get("prefix"):
            raise ValueError(
                f"chat: message {index}: the last role must be user, or assistant with prefix, got assistant"
            )
