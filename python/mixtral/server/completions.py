"""/v1/completions."""

import time
import uuid

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..model import Generation, TokenLogprob
from .bridge import Progress
from .choices import Choices
from .errors import ApiError
from .protocol import CompletionRequest
from .served import Served, served
from .streaming import ONE_OR_STREAM
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
    return await completion.respond(request, call)


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


class Completion(Choices[CompletionRequest]):
    """The choices of a completion."""

    def __init__(self, server: Served, body: CompletionRequest, prompts: list[list[int]]) -> None:
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.settings.served_model_name,
        }
        super().__init__(server, body, prompts, head)
        self._begun: set[int] = set()  # choices of which something was told
        self._offsets: dict[int, Offsets] = {}  # by choice
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

    def choice(self, index: int, new: Generation | Progress, end: Generation | None) -> dict[str, object] | None:
        """With echo, the first time the prompt too."""
        if not (new.text or end or self._tells_tokens(new)):
            return None
        prompt = None if index in self._begun else self.prompts[index // self.body.n]
        self._begun.add(index)
        echoed = prompt if prompt and self.body.echo else []
        text = self.server.model.tokenizer.decode(echoed) + new.text if echoed else new.text
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": end.finish_reason if end else None}
        if self.body.logprobs is not None:
            tokens = [*echoed, *(token.token_id for token in new.logprobs)]
            of_prompt = (new.prompt_logprobs or (end.prompt_logprobs if end else [])) if echoed else []
            choice["logprobs"] = self._logprobs(index, tokens, [*of_prompt, *new.logprobs])
        if self.body.return_token_ids:
            choice |= {"token_ids": new.token_ids, "prompt_token_ids": prompt}
        return choice

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
