"""/v1/chat/completions."""

import time
import uuid
from collections.abc import Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..model import Generation, TokenLogprob
from .bridge import Progress
from .choices import Choices
from .errors import ApiError
from .protocol import ChatRequest
from .served import Served, served
from .streaming import ONE_OR_STREAM
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
    return await chat.respond(request, call)


class Chat(Choices[ChatRequest]):
    """The choices of a chat."""

    def __init__(self, server: Served, body: ChatRequest, form: Form, prompt: list[int]) -> None:
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": server.settings.served_model_name,
            "system_fingerprint": None,
        }
        super().__init__(server, body, [prompt], head)
        self.readers = [AnswerReader(server.model.tokenizer, bool(form.tools)) for _ in range(body.n)]
        self.top = max(body.top_logprobs, 1) if body.logprobs else 0  # the engine's 0 is none at all
        rest = max(server.context - len(prompt), 1)
        self.max_tokens = body.max_completion_tokens or body.max_tokens or rest

    def first(self) -> Iterator[dict[str, object]]:
        for index in range(self.body.n):
            delta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, new: Generation | Progress, end: Generation | None) -> dict[str, object] | None:
        reader = self.readers[index]
        pieces = reader.push(new.text, new.token_ids, ended=end is not None)
        reason = reader.finish_reason(end.finish_reason) if end else None
        if self.body.stream:
            said = {"delta": pieces.delta()}
            if not said["delta"] and not reason and not self._tells_tokens(new):
                return None
        else:
            said = {"message": message_of(pieces)}
        choice = {"index": index, **said, "logprobs": self._logprobs(new.logprobs), "finish_reason": reason}
        if self.body.return_token_ids:
            choice["token_ids"] = new.token_ids
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
