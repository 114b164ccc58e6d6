"""The choices of one answer, whole or as a stream: what chats and completions share."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Generic, TypeVar

from fastapi import Request
from fastapi.responses import Response

from ..model import Generation
from .bridge import Call, Progress, result_of
from .protocol import ChatRequest, CompletionRequest
from .routing import routed_tokens
from .served import Served, usage
from .streaming import EventStream, answer, event, json_response

Body = TypeVar("Body", ChatRequest, CompletionRequest)


class Choices(ABC, Generic[Body]):
    """The choices of one answer: ``body.n`` for each prompt, in the order of the prompts."""

    def __init__(self, server: Served, body: Body, prompts: Sequence[list[int]], head: dict[str, object]) -> None:
        """``head``: what every object of the answer begins with."""
        self.server, self.body, self.prompts, self._head = server, body, prompts, head
        of_choices = [prompt for prompt in prompts for _ in range(body.n)]
        self._routed = routed_tokens(of_choices, server.texts) if body.return_routed_experts else []  # by choice

    @abstractmethod
    def choice(self, index: int, new: Generation | Progress, end: Generation | None) -> dict[str, object] | None:
        """The JSON of what is new of a choice. None: nothing that a stream would tell.

        Args:
            new: all of a whole answer.
            end: all of the choice, once it has ended.
        """

    def first(self) -> Iterator[dict[str, object]]:
        """Choices that a stream begins with, before there is anything of the engine."""
        yield from ()

    async def respond(self, request: Request, call: Call) -> Response:
        """The answer, as the body asks for it. Closes ``call`` when it ends."""
        if self.body.stream:
            return EventStream(self._stream(call), call.close)
        return json_response(await answer(request, self._whole(call), call.close))

    async def _whole(self, call: Call) -> dict[str, object]:
        generations = await call.generations()
        choices = [self._next(index, generation, generation) for index, generation in enumerate(generations)]
        tokens = self._usage(call, sum(len(generation.token_ids) for generation in generations))
        return {**self._head, "choices": choices, "usage": tokens}

    async def _stream(self, call: Call) -> AsyncIterator[bytes]:
        new_tokens = 0
        head = {**self._head, "usage": None} if self.body.include_usage else self._head
        for choice in self.first():
            yield event({**head, "choices": [choice]})
        async for index, progress in call:
            new_tokens += len(progress.token_ids)
            end = result_of(progress.outcome) if progress.outcome is not None else None
            if choice := self._next(index, progress, end):
                yield event({**head, "choices": [choice]})
        if self.body.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage(call, new_tokens)})

    def _next(self, index: int, new: Generation | Progress, end: Generation | None) -> dict[str, object] | None:
        if self._routed:
            self._routed[index].add(new)
        choice = self.choice(index, new, end)
        if choice is not None and self._routed:
            choice |= self._routed[index].take()
        return choice

    def _tells_tokens(self, new: Generation | Progress) -> bool:
        """Tokens came, and the answer tells of them beside their text."""
        body = self.body
        wants_logprobs = body.logprobs is not None and body.logprobs is not False  # of completions, 0 asks for some
        return bool(new.token_ids) and (wants_logprobs or body.return_token_ids or body.return_routed_experts)

    def _usage(self, call: Call, new_tokens: int) -> dict[str, object]:
        return usage(sum(map(len, self.prompts)), new_tokens, call.cached_tokens(self.body.n))
