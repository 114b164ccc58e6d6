"""/v1/completions."""

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..model import Generation, TokenLogprob
from .bridge import Call, Progress, result_of
from .errors import ApiError
from .protocol import CompletionRequest
from .served import Served, served, usage
from .streaming import EventStream, answer, event, json_response
from .strict_json import StrictRoute
from .token_texts import Offsets

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    server = served(request)
    server.check_name(body.model)
    given = _prompts(body, server.settings.max_prompts)
    call = server.bridge.open(len(given) * body.n)
    with call.closed_on_error():
        texts = await server.encode([prompt for prompt in given if isinstance(prompt, str)])
        completion = Completion(server, body, texts or given)
        for prompt in completion.prompts:
            for choice in range(body.n):
                server.submit(call, prompt, body, choice, max_tokens=body.max_tokens, logprobs=completion.top)
    if body.stream:
        return EventStream(completion.stream(call), call.close)
    return json_response(await answer(request, completion.whole(call), call.close))


def _prompts(body: CompletionRequest, most: int) -> list[str] | list[list[int]]:
    """One prompt or many -> many."""
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt must not be empty", "prompt", "invalid_value")
    if len(given) > most:
        raise ApiError(400, f"prompt must hold at most {most} prompts, got {len(given)}", "prompt", "invalid_value")
    return given


class Completion:
    """One answer: its id, and how what the engine says becomes JSON."""

    def __init__(self, server: Served, body: CompletionRequest, prompts: list[list[int]]) -> None:
        self.server, self.body, self.prompts = server, body, prompts
        self.top = 0 if body.logprobs is None else max(body.logprobs, 1)  # the engine's 0 is none at all
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.settings.served_model_name,
        }
        self._offsets: dict[int, Offsets] = {}  # by choice

    async def whole(self, call: Call) -> dict[str, object]:
        choices, completion_tokens = [], 0
        for index, generation in enumerate(await call.generations()):
            completion_tokens += len(generation.token_ids)
            choices.append(self._choice(index, generation, generation.finish_reason))
        return {**self._head, "choices": choices, "usage": usage(self._prompt_tokens(), completion_tokens)}

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        completion_tokens = 0
        wants_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self._head, "usage": None} if wants_usage else self._head
        async for index, progress in call:
            completion_tokens += len(progress.token_ids)
            reason = result_of(progress.outcome).finish_reason if progress.outcome is not None else None
            if progress.text or reason or (progress.token_ids and self._tells_tokens):
                yield event({**head, "choices": [self._choice(index, progress, reason)]})
        if wants_usage:
            yield event({**self._head, "choices": [], "usage": usage(self._prompt_tokens(), completion_tokens)})

    @property
    def _tells_tokens(self) -> bool:
        return self.body.logprobs is not None or self.body.return_token_ids

    def _choice(self, index: int, new: Generation | Progress, finish_reason: str | None) -> dict[str, object]:
        choice = {
            "index": index,
            "text": new.text,
            "logprobs": self._logprobs(index, new.logprobs),
            "finish_reason": finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = new.token_ids
        return choice

    def _prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, list] | None:
        """Of tokens that come after those of the calls before."""
        if self.body.logprobs is None:
            return None
        texts = self.server.texts
        offsets = self._offsets.setdefault(index, Offsets(self.server.tokenizer, continues_text=True))
        return {
            "tokens": [texts.text(token.token_id) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [self._top(token) for token in logprobs],
            "text_offset": [offsets.next(token.token_id) for token in logprobs],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The likeliest, and the token itself."""
        if not self.body.logprobs:
            return None
        return self.server.texts.top(sorted({*token.top, (token.token_id, token.logprob)}, key=lambda pair: -pair[1]))
