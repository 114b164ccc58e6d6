"""Tools, tool calls and their results of OpenAI's API, as the texts that Mistral's chat formats show the model."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def mistral_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The functions as one JSON text; empty without tools.

    Raises:
        ValueError: a tool that is no function, or without a name that fits.
    """
    if not tools:
        return ""
    return _dumps([{"type": "function", "function": _function(tool, i)} for i, tool in enumerate(tools)])


def mistral_messages(messages: Sequence[Mapping[str, Any]], version: str) -> list[dict[str, Any]]:
    """The messages as ``_C.ChatFormat`` takes them: each tool call as a JSON text, and results as ``version`` has them.

    A tokenizer v2 shows the name of the function with its result: the message's, else that of the call with its id.

    Raises:
        ValueError: naming the message, where a call or a result is not as OpenAI's API has it, or has an id that
            tokenizers v3 and v7 do not take.
    """
    names: dict[str, str] = {}  # of the functions called, by the id of the call
    prepared = []
    for index, message in enumerate(messages):
        message = dict(message)
        if message.get("tool_calls") is None:
            message.pop("tool_calls", None)
        else:
            calls = [_call(call, index) for call in message["tool_calls"]]
            names |= {call["id"]: call["name"] for call in calls}
            message["tool_calls"] = [_call_text(call, version, index) for call in calls]
            message["content"] = message.get("content") or ""
        if message.get("role") == "tool":
            message = _result(message, names, version, index)
        prepared.append(message)
    return prepared


def _function(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise ValueError(f'chat: tools[{index}] must be {{"type": "function", "function": {{...}}}}')
    _check_name(function.get("name"), f"tools[{index}]")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"chat: tools[{index}]: parameters must be a JSON schema, got {type(parameters).__name__}")
    return {"name": function["name"], "description": function.get("description") or "", "parameters": parameters}


def _call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    except (KeyError, TypeError):
        raise ValueError(
            f'chat: message {index}: a tool call must be {{"id": ..., "type": "function", '
            f'"function": {{"name": ..., "arguments": a JSON text}}}}'
        ) from None
    _check_name(name, f"message {index}")
    return {"id": call.get("id") or "", "name": name, "arguments": _parsed(arguments)}


def _call_text(call: dict[str, Any], version: str, index: int) -> str:
    shown = {"name": call["name"], "arguments": call["arguments"]}
    if version != "v2":
        shown["id"] = _checked_id(call["id"], index)
    return _dumps(shown)


def _result(message: dict[str, Any], names: dict[str, str], version: str, index: int) -> dict[str, Any]:
    call_id, content = message.get("tool_call_id") or "", message.get("content") or ""
    if version == "v2":
        content = _dumps([{"name": message.get("name") or names.get(call_id), "content": _parsed(content)}])
    else:
        _checked_id(call_id, index)
        if version != "v7":
            content = _dumps({"content": _parsed(content), "call_id": call_id})
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def _parsed(text: Any) -> Any:
    """JSON stands in the prompt as JSON, nothing as an empty object, and any other text as a string."""
    if not isinstance(text, str):
        return {} if text is None else text
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise ValueError("chat: the JSON of a tool, a call or a result is nested too deeply") from None


def _check_name(name: Any, where: str) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"chat: {where}: the name of a function has 1 to 64 of a-z, A-Z, 0-9, _ and -, got {name!r}")


def _checked_id(call_id: Any, index: int) -> str:
    if not (isinstance(call_id, str) and _CALL_ID.fullmatch(call_id)):
        raise ValueError(
            f"chat: message {index}: the id of a tool call has 9 of a-z, A-Z and 0-9 with this model's tokenizer, "
            f"got {call_id!r}"
        )
    return call_id
