"""/v1/completions."""

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..model import TokenLogprob
from .bridge import Call
from .errors import ApiError
from .protocol import CompletionRequest
from .served import Served, check_generation, served, usage
from .streaming import EventStream, answer, event, json_response
from .strict_json import StrictRoute
from .token_texts import Offsets

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    server = served(request)
    server.check_name(body.model)
    completion = Completion(server, body, await _prompts(server, body))
    call = server.bridge.call()
    try:
        for prompt in completion.prompts:
            for choice in range(body.n):
                server.submit(call, prompt, body, choice, max_tokens=body.max_tokens, logprobs=completion.top)
    except BaseException:
        call.close()
        raise
    if body.stream:
        return EventStream(completion.stream(call), call.close)
    return json_response(await answer(request, completion.whole(call), call.close))


async def _prompts(server: Served, body: CompletionRequest) -> list[list[int]]:
    """As token ids."""
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt must not be empty", "prompt", "invalid_value")
    if len(given) > server.settings.max_prompts:
        message = f"prompt must hold at most {server.settings.max_prompts} prompts, got {len(given)}"
        raise ApiError(400, message, "prompt", "invalid_value")
    return [await server.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]


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
            check_generation(generation)
            completion_tokens += len(generation.token_ids)
            logprobs = self._logprobs(index, generation.logprobs)
            choices.append(_choice(index, generation.text, logprobs, generation.finish_reason))
        return {**self._head, "choices": choices, "usage": usage(self._prompt_tokens(), completion_tokens)}

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        completion_tokens = 0
        wants_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self._head, "usage": None} if wants_usage else self._head
        async for index, progress in call:
            completion_tokens += len(progress.token_ids)
            reason = None
            if progress.outcome is not None:
                reason = check_generation(progress.outcome.result()).finish_reason
            if progress.text or progress.logprobs or reason:
                logprobs = self._logprobs(index, progress.logprobs)
                yield event({**head, "choices": [_choice(index, progress.text, logprobs, reason)]})
        if wants_usage:
            yield event({**self._head, "choices": [], "usage": usage(self._prompt_tokens(), completion_tokens)})

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


def _choice(index: int, text: str, logprobs: dict[str, list] | None, finish_reason: str | None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
