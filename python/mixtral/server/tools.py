"""What a chat asks of its answer beyond text: tool calls, and a format."""

from dataclasses import dataclass, field
from typing import Any

from ..tokenizer import Tokenizer
from .errors import ApiError
from .grammar import Schema, answer_grammar
from .protocol import ChatRequest, NamedTool
from .tool_calls import Pieces, ToolParser, tool_calls_id


@dataclass
class Form:
    """Of the answers to one request.

    Attributes:
        tools: what the model is shown.
        grammar: that answers must match; None: they are free.
        param: the field of the request that the grammar is of.
    """

    tools: list[dict[str, Any]] = field(default_factory=list)
    grammar: str | None = None
    param: str = ""


def form_of(body: ChatRequest, tokenizer: Tokenizer, tool_format: str | None) -> Form:
    """
    Args:
        tool_format: the format of Mistral's in which the model takes tools; None: it takes none.

    Raises:
        ApiError: 400 for what the model cannot do, and for parameters that exclude each other.
    """
    _check_choice(body)
    tools = [] if body.tool_choice == "none" else body.tools
    if tools and tool_format is None:
        message = "tools: this model takes none; they need one of Mistral's chat formats, of tokenizer v2, v3 or v7"
        raise ApiError(400, message, "tools", "unsupported_parameter")
    form = Form(tools=[tool.model_dump(exclude_unset=True) for tool in tools])
    schema = body.response_format.schema_of_text() if body.response_format else None
    calls = _calls(body, schema, tool_format) if tools else "none"
    strict = not body.parallel_tool_calls or any(tool.function.strict for tool in tools)
    if schema is None and (not tools or (calls != "must" and not strict)):
        return form
    form.param = "response_format" if schema is not None else "tools"
    _check_free_end(body, form.param)
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    functions = [(tool.function.name, tool.function.parameters) for tool in tools]
    form.grammar = answer_grammar(
        schema,
        calls,
        [function for function in functions if named in (None, function[0])],
        tool_calls_id(tokenizer),
        several=body.parallel_tool_calls,
    )
    return form


def _calls(body: ChatRequest, schema: Schema | None, tool_format: str | None) -> str:
    """As of ``answer_grammar``. Models before v7 answer with text or with calls, never both."""
    if body.tool_choice != "auto":
        return "must"
    return "behind" if tool_format == "mistral-v7" and schema is None else "may"


def _check_choice(body: ChatRequest) -> None:
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have one name", "tools", "invalid_value")
    if not names and body.tool_choice not in ("auto", "none"):
        raise ApiError(400, "tool_choice needs tools", "tool_choice", "invalid_value")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        message = f"tool_choice: there is no tool {body.tool_choice.function.name!r}"
        raise ApiError(400, message, "tool_choice", "invalid_value")


def _check_free_end(body: ChatRequest, param: str) -> None:
    """An answer of a grammar ends where that ends, and begins where it begins."""
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name):
            raise ApiError(400, f"{name} cannot be used with {param}: the answer ends with its grammar", name)
    if body.messages[-1].role == "assistant":
        raise ApiError(400, f"messages: an answer that is begun cannot be used with {param}", "messages")


class AnswerReader:
    """One answer, as deltas: its text without the space before the first word, and its tool calls."""

    def __init__(self, tokenizer: Tokenizer, calls: bool) -> None:
        """``calls``: the model was shown tools."""
        self._parser = ToolParser(tokenizer) if calls else None
        self._begun = False

    def push(self, text: str, token_ids: list[int], ended: bool) -> Pieces:
        """Takes what the engine gave; ``ended``: it was the last."""
        pieces = self._parser.push(text, token_ids) if self._parser else Pieces(text)
        if self._parser and ended:
            last = self._parser.finish()
            pieces = Pieces(pieces.content + last.content, pieces.calls + last.calls)
        if pieces.content and not self._begun:
            self._begun = True
            pieces.content = pieces.content.removeprefix(" ")
        return pieces

    def finish_reason(self, engine_says: str) -> str:
        called = self._parser is not None and self._parser.calls > 0
        return "tool_calls" if called and engine_says == "stop" else engine_says


def message_of(pieces: Pieces) -> dict[str, Any]:
    """The message of a whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": pieces.content, "refusal": None}
    if pieces.calls:
        calls: list[dict[str, Any]] = []
        for piece in pieces.calls:
            if piece.name is not None:
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[-1]["function"]["arguments"] += piece.arguments
        message |= {"content": pieces.content or None, "tool_calls": calls}
    return message
