"""Grammars that answers must match: JSON, JSON of a schema, and tool calls; by llguidance.

A grammar says which tokens may come next, as a mask. The engine lets a constrained request wait until it has its mask
(``Engine.allow``), and goes on with the others.
"""

import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..tokenizer import Tokenizer
from ..worker import Worker
from .errors import ApiError, log

MAX_BYTES = 64 << 10  # of a schema, as JSON
MAX_DEPTH = 48
MAX_CALLS = 16  # in one answer
SECONDS = 2.0  # to compile a schema
TOGETHER_SECONDS = 0.01  # for the masks of requests that share a forward pass

# Between the parts of JSON, where there may be any amount of space: on one line, or on lines that are indented. Without
# a limit a model may go on with spaces for ever.
_SPACE = r"( |\r?\n[ \t]{0,32})"

_worker = Worker(
    Path(__file__).with_name("_grammar_worker.py"), SECONDS, "response_format needs llguidance: pip install llguidance"
)

Schema = dict[str, Any]


def answer_grammar(
    schema: Schema | None = None,
    calls: str = "none",
    tools: Iterable[tuple[str, Schema | None]] = (),
    marker: int | None = None,
    several: bool = True,
) -> str:
    """The grammar of an answer, for ``Grammars.matcher``.

    Models of Mistral's begin an answer with a space, so that it may stand before the JSON.

    Args:
        schema: of the text; None: any text.
        calls: "none"; "may", instead of the text; "behind", after or instead of it; or "must".
        tools: (name, schema of its arguments) of each function that may be called.
        marker: the token that stands before the calls.
        several: whether there may be more calls than one.

    Raises:
        ApiError: 400 for a schema that is too large.
    """
    start = {"none": "text", "may": "text | calls", "behind": "text calls?", "must": "calls"}[calls]
    rules = [f"start: {start}"]
    if calls != "must":
        rules.append(r"text: /(.|\n)*/" if schema is None else f'text: " "? {_json(schema, "response_format")}')
    if calls != "none":
        rules += _call_rules(list(tools), marker, several)
    return "\n".join(rules)


def _call_rules(tools: list[tuple[str, Schema | None]], marker: int | None, several: bool) -> list[str]:
    more = f' (", " call){{0,{MAX_CALLS - 1}}}' if several else ""
    rules = [f'calls: <[{marker}]> " "? "[" call{more} "]"']
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))
    for i, (name, parameters) in enumerate(tools):
        head = json.dumps('{"name": "' + name + '", "arguments": ')
        nothing = {"properties": {}, "additionalProperties": False}
        schema = {"type": "object", **(nothing if parameters is None else parameters)}
        # Each schema is a root of its own, to which its $refs refer.
        rules.append(f'call{i}: {head} {_json(schema, "tools")} (", \\"id\\": \\"" /[a-zA-Z0-9]{{9}}/ "\\"")? "}}"')
    return rules


def _json(schema: Schema, param: str) -> str:
    if _depth(schema) > MAX_DEPTH:
        raise ApiError(400, f"{param}: a schema may be nested {MAX_DEPTH} deep, not more", param, "schema_too_large")
    text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACE}})
    if len(text) > MAX_BYTES:
        raise ApiError(400, f"{param}: a schema may have {MAX_BYTES >> 10} KiB, not more", param, "schema_too_large")
    return f"%json {text}"


def _depth(value: object) -> int:
    """How deeply lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth


class Grammars:
    """Makes matchers for one model; its methods may be called on any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """
        Args:
            vocab_size: of the model, which may have more ids than its tokenizer.
            eos_ids: the tokens that end an answer.
        """
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, list(eos_ids)
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(maxsize=64)(self._compile)

    def matcher(self, grammar: str, param: str) -> "Matcher":
        """A matcher at the beginning of an answer. Takes milliseconds, and seconds when it is called first.

        Args:
            grammar: of ``answer_grammar``.
            param: the field of the request that it was made of.

        Raises:
            ApiError: 400 for a schema that is wrong, has parts that cannot be enforced, or is too complex.
        """
        with self._lock:
            return Matcher(self._compiled(grammar, param).deep_copy(), self._vocab_size)

    def _compile(self, grammar: str, param: str):
        from llguidance import LLMatcher, LLParserLimits

        compiled = LLMatcher.grammar_from_lark(grammar)
        answer = _worker.ask({"grammar": compiled})
        if answer is None:
            raise ApiError(400, f"{param}: the schema is too complex", param, "schema_too_complex")
        if answer["error"]:
            raise ApiError(400, f"{param}: {_reason(answer['error'])}", param, "invalid_schema")
        # Limits on what one token may cost, and on memory: 10,000 states of the lexer are 20 MB.
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=10_000)
        matcher = LLMatcher(self._vocabulary, compiled, log_level=0, limits=limits)
        first = Matcher(matcher.deep_copy(), self._vocab_size)
        first.mask_behind([])
        if first.error:
            raise ApiError(400, f"{param}: the schema is too complex, or nothing fits it", param, "schema_too_complex")
        return matcher

    @functools.cached_property
    def _vocabulary(self):
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer)), n_vocab=self._vocab_size, eos_token=self._eos_ids
        )


class _Vocabulary:
    """The tokenizer as llguidance asks for it: what each token stands for, in bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [
            token for token, piece in enumerate(pieces) if tokenizer.is_control(token) or piece in ("", "<unk>")
        ]
        special = set(self.special_token_ids)
        self.tokens = [
            (piece or f"<{token}>").encode() if token in special else _bytes(piece, tokenizer.is_byte(token))
            for token, piece in enumerate(pieces)
        ]

    def __call__(self, text: bytes) -> list[int]:
        # A line break, as two tokens, keeps the tokenizer from putting a space in front.
        return self._tokenizer.encode(b"\n" + text)[2:]


def _bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[1:-1], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def _reason(error: str) -> str:
    """llguidance's words, without where in the grammar it is."""
    first, *others = error.split("\n")
    if "oneOf constraints" in first:
        return "oneOf needs alternatives that exclude each other; use anyOf"
    of_pattern = next((line for line in others if line.startswith("error: ")), "")
    return first.split("failed to compile JSON schema: ")[-1] + of_pattern.removeprefix("error:")


class Matcher:
    """What one answer must match from here on.

    Attributes:
        error: why it cannot go on, for the client.
    """

    def __init__(self, matcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self.error: str | None = None

    def copy(self) -> "Matcher":
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def mask_behind(self, token_ids: Iterable[int]) -> bytes:
        """Takes new tokens, and says which may come next: bytes of int32 [ceil(vocab / 32)], bit i % 32 of word i / 32
        for i.

        None may come, and ``error`` is set, where the grammar takes too much work from here on.
        """
        size = (self._vocab_size + 31) // 32 * 4
        try:
            for token in token_ids:
                self._matcher.consume_token(token)
            mask = self._matcher.compute_bitmask()  # may have a word more
        except BaseException as error:  # a panic in llguidance's Rust is no Exception
            log.error("a grammar failed: %s", type(error).__name__, exc_info=error)
            self.error = "the server failed at this grammar"
            return bytes(size)
        if self._matcher.is_error() or (self._matcher.is_stopped() and not self._matcher.is_accepting()):
            self.error = "the schema is too complex for this answer, or nothing fits it"
            return bytes(size)
        return mask[:size]


class Due(NamedTuple):
    """A constrained request whose next mask is due."""

    request: int  # of the engine
    matcher: Matcher
    token_ids: Sequence[int] = ()  # that are new


class MaskThread:
    """Gives constrained requests their masks, on a thread of its own."""

    def __init__(self, allow: Callable[[Sequence[int], Sequence[bytes]], None]) -> None:
        """
        Args:
            allow: ``Engine.allow``.
        """
        self._allow = allow
        self._work: queue.SimpleQueue[list[Due] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
        self._thread.start()

    def push(self, due: list[Due]) -> None:
        """Returns at once. The requests of one call, those of one forward pass, get their masks together, so that they
        share the next pass too."""
        self._work.put(due)

    def close(self) -> None:
        """Ends the thread, once it has done what is queued."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (all_due := self._work.get()) is not None:
            masks, begin = {}, time.monotonic()
            for due in all_due:
                masks[due.request] = due.matcher.mask_behind(due.token_ids)
                if time.monotonic() > begin + TOGETHER_SECONDS:  # the others do not wait for a slow one
                    self._send(masks)
                    masks = {}
            self._send(masks)

    def _send(self, masks: dict[int, bytes]) -> None:
        if masks:
            self._allow(list(masks), list(masks.values()))
