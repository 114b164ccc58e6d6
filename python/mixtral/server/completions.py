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
from .routing import routed_tokens
from .served import Served, served, usage
from .streaming import ONE_OR_STREAM, EventStream, answer, event, json_response
from .strict_json import StrictRoute
from .token_texts import Offsets

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions", responses=ONE_OR_STREAM)
async def completions(body: CompletionRequest, request: Request) -> Response:
    server = served(request)
    server.check(body)
    given = _prompts(body, server.settings.max_prompts)
    call = server.bridge.open(len(given) * body.n)
    with call.closed_on_error():
        encoded = await server.encode([prompt for prompt in given if isinstance(prompt, str)])
        completion = Completion(server, body, encoded or given)
        for prompt in completion.prompts:
            for choice in range(body.n):
                server.submit(call, prompt, body, choice, **completion.params())
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
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.settings.served_model_name,
        }
        self._begun: set[int] = set()  # choices of which something was told
        self._offsets: dict[int, Offsets] = {}  # by choice
        choices = [prompt for prompt in prompts for _ in range(body.n)]
        self._routed = routed_tokens(choices, server.texts) if body.return_routed_experts else []  # by choice
        if body.logprobs is not None or body.echo:
            server.need_tokenizer("logprobs" if body.logprobs is not None else "echo")

    def params(self) -> dict[str, object]:
        """Arguments of ``_C.SamplingParams`` that depend on more than one field."""
        top = 0 if self.body.logprobs is None else max(self.body.logprobs, 1)  # the engine's 0 is none at all
        params = {"max_tokens": self.body.max_tokens, "logprobs": top}
        if self.body.echo and top:
            params["prompt_logprobs"] = top
            # Who scores a prompt cuts one new token off (lm-evaluation-harness does): it must be there, even if it is
            # the end of the text.
            params["ignore_eos"] = self.body.ignore_eos or self.body.max_tokens == 1
        return params

    async def whole(self, call: Call) -> dict[str, object]:
        choices, completion_tokens = [], 0
        for index, generation in enumerate(await call.generations()):
            completion_tokens += len(generation.token_ids)
            if self._routed:
                self._routed[index].add(generation)
            choices.append(self._choice(index, generation, generation.prompt_logprobs, generation.finish_reason))
        tokens = usage(self._prompt_tokens(), completion_tokens, call.cached_tokens(self.body.n))
        return {**self._head, "choices": choices, "usage": tokens}

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        completion_tokens = 0
        head = {**self._head, "usage": None} if self.body.include_usage else self._head
        async for index, progress in call:
            completion_tokens += len(progress.token_ids)
            end = result_of(progress.outcome) if progress.outcome is not None else None
            if self._routed:
                self._routed[index].add(progress)
            if progress.text or end or (progress.token_ids and self._tells_tokens):
                of_prompt = progress.prompt_logprobs or (end.prompt_logprobs if end else [])
                choice = self._choice(index, progress, of_prompt, end.finish_reason if end else None)
                yield event({**head, "choices": [choice]})
        if self.body.include_usage:
            tokens = usage(self._prompt_tokens(), completion_tokens, call.cached_tokens(self.body.n))
            yield event({**self._head, "choices": [], "usage": tokens})

    @property
    def _tells_tokens(self) -> bool:
        return self.body.logprobs is not None or self.body.return_token_ids or self.body.return_routed_experts

    def _choice(
        self,
        index: int,
        new: Generation | Progress,
        prompt_logprobs: list[TokenLogprob | None],
        finish_reason: str | None,
    ) -> dict[str, object]:
        """What is new of a choice; with echo the first time the prompt too."""
        prompt = None if index in self._begun else self.prompts[index // self.body.n]
        self._begun.add(index)
        echoed = prompt if prompt and self.body.echo else []
        text = self.server.model.tokenizer.decode(echoed) + new.text if echoed else new.text
        choice: dict[str, object] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self.body.logprobs is not None:
            tokens = [*echoed, *(token.token_id for token in new.logprobs)]
            logprobs = [*(prompt_logprobs if echoed else ()), *new.logprobs]
            choice["logprobs"] = self._logprobs(index, tokens, logprobs)
        if self.body.return_token_ids:
            choice |= {"token_ids": new.token_ids, "prompt_token_ids": prompt}
        if self._routed:
            choice |= self._routed[index].take()
        return choice

    def _prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def _logprobs(self, index: int, tokens: list[int], logprobs: list[TokenLogprob | None]) -> dict[str, list[object]]:
        texts = self.server.texts
        if index not in self._offsets:
            self._offsets[index] = Offsets(self.server.model.tokenizer, continues_text=not self.body.echo)
        offsets = self._offsets[index]
        return {
            "tokens": [texts.text(token) for token in tokens],
            "token_logprobs": [token.logprob if token else None for token in logprobs],
            "top_logprobs": [self._top(token) if token else None for token in logprobs],
            "text_offset": [offsets.next(token) for token in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The likeliest, and the token itself."""
        if not self.body.logprobs:
            return None
        return self.server.texts.top(sorted({*token.top, (token.token_id, token.logprob)}, key=lambda pair: -pair[1]))
