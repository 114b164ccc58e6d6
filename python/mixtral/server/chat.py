"""/v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..model import Generation, TokenLogprob
from .bridge import Call, Progress, result_of
from .errors import ApiError
from .protocol import ChatRequest
from .routing import routed_tokens
from .served import Served, served, usage
from .streaming import ONE_OR_STREAM, EventStream, answer, event, json_response
from .strict_json import StrictRoute
from .tools import AnswerReader, Form, form_of, message_of

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", responses=ONE_OR_STREAM)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    server = served(request)
    server.check(body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    form = form_of(body, server.need_tokenizer("messages"), server.tool_format)
    call = server.bridge.open(body.n)
    with call.closed_on_error():
        prompt = await server.chat_prompt(body.messages, form.tools)
        matchers = await server.matchers(form.grammar, form.param, body.n)
        chat = Chat(server, body, form, prompt)
        for choice, matcher in enumerate(matchers):
            server.submit(call, prompt, body, choice, matcher, max_tokens=chat.max_tokens, logprobs=chat.top)
    if body.stream:
        return EventStream(chat.stream(call), call.close)
    return json_response(await answer(request, chat.whole(call), call.close))


class Chat:
    """One answer: its id, and how what the engine says becomes JSON."""

    def __init__(self, server: Served, body: ChatRequest, form: Form, prompt: list[int]) -> None:
        self.server, self.body, self.prompt = server, body, prompt
        self.readers = [AnswerReader(server.model.tokenizer, bool(form.tools)) for _ in range(body.n)]
        self.top = max(body.top_logprobs, 1) if body.logprobs else 0  # the engine's 0 is none at all
        rest = max(server.context - len(prompt), 1)
        self.max_tokens = body.max_completion_tokens or body.max_tokens or rest
        self._routed = routed_tokens([prompt] * body.n, server.texts) if body.return_routed_experts else []  # by choice
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": server.settings.served_model_name,
            "system_fingerprint": None,
        }

    async def whole(self, call: Call) -> dict[str, object]:
        choices, completion_tokens = [], 0
        for index, generation in enumerate(await call.generations()):
            completion_tokens += len(generation.token_ids)
            if self._routed:
                self._routed[index].add(generation)
            reader = self.readers[index]
            message = message_of(reader.push(generation.text, generation.token_ids, ended=True))
            reason = reader.finish_reason(generation.finish_reason)
            choices.append(self._choice(index, {"message": message}, generation, reason))
        tokens = usage(len(self.prompt), completion_tokens, call.cached_tokens(self.body.n))
        return {**self._head, "choices": choices, "usage": tokens}

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        completion_tokens = 0
        head = {**self._head, "usage": None} if self.body.include_usage else self._head
        for index in range(self.body.n):
            first = {"role": "assistant", "content": ""}
            yield event(
                {**head, "choices": [{"index": index, "delta": first, "logprobs": None, "finish_reason": None}]}
            )
        async for index, progress in call:
            completion_tokens += len(progress.token_ids)
            ended = result_of(progress.outcome) if progress.outcome is not None else None
            if self._routed:
                self._routed[index].add(progress)
            delta = self.readers[index].push(progress.text, progress.token_ids, ended is not None).delta()
            reason = self.readers[index].finish_reason(ended.finish_reason) if ended else None
            if delta or reason or (progress.token_ids and self._tells_tokens):
                yield event({**head, "choices": [self._choice(index, {"delta": delta}, progress, reason)]})
        if self.body.include_usage:
            tokens = usage(len(self.prompt), completion_tokens, call.cached_tokens(self.body.n))
            yield event({**self._head, "choices": [], "usage": tokens})

    @property
    def _tells_tokens(self) -> bool:
        return self.body.logprobs or self.body.return_token_ids or self.body.return_routed_experts

    def _choice(
        self, index: int, message: dict[str, object], new: Generation | Progress, finish_reason: str | None
    ) -> dict[str, object]:
        logprobs = self._logprobs(new.logprobs)
        choice = {"index": index, **message, "logprobs": logprobs, "finish_reason": finish_reason}
        if self.body.return_token_ids:
            choice["token_ids"] = new.token_ids
        if self._routed:
            choice |= self._routed[index].take()
        return choice

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, object] | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._token(token) for token in logprobs], "refusal": None}

    def _token(self, token: TokenLogprob) -> dict[str, object]:
        top = token.top[: self.body.top_logprobs]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": [self._entry(*pair) for pair in top]}

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        texts = self.server.texts
        return {"token": texts.text(token), "logprob": logprob, "bytes": texts.bytes(token)}
