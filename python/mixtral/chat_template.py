"""Renders chat templates as transformers does it, with Jinja, and within limits of time and memory.

A template comes with a model, from anyone. Jinja's sandbox keeps it from the rest of Python, not from running for ever
or filling the memory. So it runs in a process of its own (_template_worker.py), which is ended after ``SECONDS``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import LoadError
from .worker import Worker

SECONDS = 2.0  # to render one template

Message = dict[str, object]

# Put behind the message that the model goes on with, and cut off again, as transformers does it.
_CUT = "CONTINUE_FINAL_MESSAGE_TAG "

_worker = Worker(
    Path(__file__).with_name("_template_worker.py"),
    SECONDS,
    "chat templates need jinja2 3.1 or later: pip install jinja2",
)


def render(
    template: str,
    file: str,
    messages: list[Message],
    special_tokens: dict[str, str],
    closed: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a conversation, up to where the model's answer begins.

    Args:
        template: Jinja.
        file: where it comes from, for errors.
        messages: with "role" and "content"; "prefix": True on the last one, an assistant's, makes the model go on with
            it.
        special_tokens: the template's variables ``bos_token``, ``eos_token`` and so on.
        closed: up to the end of the last message instead, with what the template puts behind it.
        tools: the template's variable ``tools``.

    Raises:
        ValueError: the template raises an exception; the message holds its words.
        LoadError: the template is no Jinja, fails, or takes more than 2 seconds, 512 MiB, or 16 MiB of text.
    """
    goes_on = bool(messages[-1].get("prefix"))
    shown = [{key: value for key, value in message.items() if key != "prefix"} for message in messages]
    if goes_on:
        shown[-1]["content"] = str(shown[-1]["content"]) + _CUT
    variables = dict(
        special_tokens, messages=shown, add_generation_prompt=not (goes_on or closed), tools=tools, documents=None
    )
    answer = _worker.ask({"template": template, "variables": variables}) or {
        "error": "limit",
        "message": f"takes more than {SECONDS:g} seconds or too much memory to render",
    }
    if "text" in answer:
        return _cut(answer["text"]) if goes_on else answer["text"]
    if answer["error"] == "refused":
        raise ValueError(f"chat: the chat template says: {answer['message']}")
    reason = answer["message"]
    raise LoadError(f"{file}: chat_template: {reason}", file, "chat_template", reason)


def _cut(text: str) -> str:
    place = text.rfind(_CUT.strip())
    if place < 0:
        raise ValueError("chat: the chat template does not show the message that the model is to go on with")
    return text[:place] if text.startswith(_CUT, place) else text[:place].rstrip()
