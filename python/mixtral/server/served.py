"""The model that a server serves: names, prompts as token ids, and the parameters of a request."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from .. import _C
from ..errors import LoadError, RankError
from ..model import Mixtral
from ..tokenizer import Tokenizer
from .bridge import Bridge, Call
from .errors import ApiError
from .grammar import Grammars, Matcher
from .metrics import Metrics
from .protocol import Message, Sampling
from .settings import Settings
from .token_texts import TokenTexts

LONG_TEXT = 8192  # characters from which on a text is tokenized on a thread of its own, beside the event loop


class Served:
    """One per app, in ``app.state.served``.

    Attributes:
        model, settings: what the server was started with.
        bridge: set while the server runs.
        metrics: what /metrics shows.
        context: most tokens of a prompt and its answer.
        texts: of single tokens; None without a tokenizer.
        chat_format: how chats become prompts, in words; None: the model is for completions only.
        tool_format: that of Mistral's in which the model is shown tools; None: it takes none.
    """

    def __init__(self, model: Mixtral, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.bridge: Bridge | None = None
        self.metrics = Metrics(settings.served_model_name, model.engine)
        self._threads = ThreadPoolExecutor(1, "tokenize")
        self._template = settings.chat_template
        self.chat_format = self._find_chat_format()
        self.tool_format = model.tokenizer.tool_format(self._template) if self.chat_format else None
        self.context = model.context
        self.texts = TokenTexts(model.tokenizer) if model.tokenizer else None
        self._grammar_thread = ThreadPoolExecutor(1, "grammar")
        eos_ids = model.config.eos_token_ids
        self._grammars = Grammars(model.tokenizer, model.config.vocab_size, eos_ids) if model.tokenizer else None

    def check(self, body: Sampling) -> None:
        """Raises ApiError for what no request may ask of this server."""
        self.check_name(body.model)
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options", "invalid_value")

    def need_tokenizer(self, param: str) -> Tokenizer:
        """Raises ApiError 400, naming ``param``, where the model has none."""
        if self.model.tokenizer is None:
            message = f"{param} needs a tokenizer, and the model has none: it works on token ids alone"
            raise ApiError(400, message, param, "invalid_value")
        return self.model.tokenizer

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 unless ``name`` is the served model's."""
        if name not in (None, self.settings.served_model_name):
            message = f"the model {name!r} does not exist; this server has {self.settings.served_model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def encode(self, texts: Sequence[str], add_bos: bool = True) -> list[list[int]]:
        """The ids of each text. Raises ApiError 400 for an empty one."""
        if not all(texts):
            raise ApiError(400, "prompt must not be empty", "prompt", "invalid_value")
        if not texts:
            return []
        tokenizer = self.need_tokenizer("prompt")

        def work() -> list[list[int]]:
            return [tokenizer.encode(text, add_bos) for text in texts]

        if sum(map(len, texts)) < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def chat_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Raises ApiError 400 for what the model's format refuses."""
        shown = [_shown(message) for message in messages]
        uses_tools = tools or any(message.role == "tool" or message.tool_calls for message in messages)
        template = self.tool_format or self._template if uses_tools else self._template
        if shown[-1]["role"] == "assistant":
            shown[-1]["prefix"] = True
        call = self.need_tokenizer("messages").apply_chat
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, shown, template, list(tools))
        except (ValueError, LoadError) as error:
            raise ApiError(400, str(error).removeprefix("apply_chat: "), "messages", "invalid_value") from None

    async def matchers(self, grammar: str | None, param: str, count: int) -> list[Matcher] | list[None]:
        """One for each answer; Nones where they are free. Raises ApiError as ``Grammars.matcher``."""
        if grammar is None:
            return [None] * count
        compile_grammar = self._grammars.matcher
        loop = asyncio.get_running_loop()
        matcher = await loop.run_in_executor(self._grammar_thread, compile_grammar, grammar, param)
        return [matcher.copy() for _ in range(count)]

    def submit(
        self,
        call: Call,
        prompt: list[int],
        body: Sampling,
        choice: int,
        matcher: Matcher | None = None,
        **params: object,
    ) -> None:
        """Adds one sequence to ``call``. ``params``: max_tokens, logprobs, and what else goes before ``body``.

        Raises:
            ApiError: 400 for what the engine refuses.
        """
        seed = None if body.seed is None else _C.sample_seed(body.seed % 2**64, choice)
        try:
            sampling = _C.SamplingParams(**{**body.sampling_params(), "seed": seed, **params})
            call.submit(prompt, sampling, body.experts_per_token or 0, body.return_routed_experts, matcher)
        except (ValueError, IndexError) as error:
            raise _refused(str(error)) from None
        except RankError as error:
            raise ApiError(503, f"the engine stopped: {error}", code="engine_dead") from None
        except MemoryError as error:  # its keys and values would never fit
            raise ApiError(400, str(error), "max_tokens", "context_length_exceeded") from None

    def _find_chat_format(self) -> str | None:
        if self.model.tokenizer is None:
            return None
        try:
            self.model.tokenizer.apply_chat([{"role": "user", "content": "Hi"}], self._template)
            return self._template or "the model's own"
        except (ValueError, LoadError):
            self._template = f"mistral-{self.model.tokenizer.version}"
        try:
            self.model.tokenizer.apply_chat([{"role": "user", "content": "Hi"}], self._template)
            return f"{self._template}, after the tokenizer: the model has no chat template"
        except (ValueError, LoadError):
            return None


def served(request: Request) -> Served:
    return request.app.state.served


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _shown(message: Message) -> dict[str, Any]:
    """The message as ``Tokenizer.apply_chat`` takes it."""
    shown: dict[str, Any] = {"role": _role(message.role), "content": message.text()}
    if message.tool_calls:
        shown["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.role == "tool":
        shown["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            shown["name"] = message.name
    return shown


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _refused(message: str) -> ApiError:
    """The engine's errors begin with the name of the field that is wrong, or are of the prompt's ids."""
    name = message.split(" ", 1)[0]
    if name.isidentifier():
        return ApiError(400, message, name, "invalid_value")
    return ApiError(400, f"prompt: {message.removeprefix('Mixtral: ')}", "prompt", "invalid_value")
