"""From the engine's thread to the event loop.

The engine's thread puts events into a box in C++ and never takes the GIL. One eventfd wakes the loop, which hands them
to the calls that they belong to. What a slow client leaves is merged, in the box and here, so memory stays bounded.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from .. import _C
from ..errors import QueueFull, RankError
from ..model import Generation, Mixtral, TokenLogprob
from . import logs
from .errors import ApiError
from .grammar import Due, MaskThread, Matcher
from .metrics import Metrics, SequenceTimes
from .recorder import Recorder


class Progress:
    """What happened to one sequence since its consumer last looked.

    Attributes:
        text: that became certain; may be empty.
        token_ids, logprobs: of new tokens.
        prompt_logprobs: those of the prompt, beside the first new token.
        routed_experts, routed_weights: [rows, L, K] each, of the tokens that the model read meanwhile.
        outcome: set when the sequence has ended.
    """

    __slots__ = ("text", "token_ids", "logprobs", "prompt_logprobs", "routed_experts", "routed_weights", "outcome")

    def __init__(self, event: _C.Event) -> None:
        self.text: str = event.text
        self.token_ids: list[int] = event.token_ids
        self.logprobs: list[TokenLogprob] = event.logprobs
        self.prompt_logprobs: list[TokenLogprob | None] = event.prompt_logprobs
        self.routed_experts: list[Tensor] = []
        self.routed_weights: list[Tensor] = []
        if (experts := event.routed_experts) is not None:
            self.routed_experts, self.routed_weights = [experts], [event.routed_weights]
        self.outcome: _C.Outcome | _Refused | None = event.outcome

    def merge(self, later: "Progress") -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.routed_experts += later.routed_experts
        self.routed_weights += later.routed_weights
        self.outcome = later.outcome


class Call:
    """The sequences of one HTTP request. Iterating gives (index of the sequence, Progress) until all have ended."""

    def __init__(self, bridge: "Bridge", seats: list[_C.Seat]) -> None:
        self._bridge = bridge
        self._seats = seats  # of the sequences that are still to come
        self._ids: list[int] = []  # of the engine
        self._keys: list[int] = []
        self._pending: dict[int, Progress] = {}
        self._news = asyncio.Event()
        self._left = 0
        self._prompt_tokens = self._new_tokens = 0
        self._finish_reasons: list[str] = []
        self._cached: dict[int, int] = {}  # by sequence

    def submit(
        self,
        prompt: Sequence[int],
        params: _C.SamplingParams,
        experts_per_token: int = 0,
        routed: bool = False,
        matcher: Matcher | None = None,
    ) -> None:
        """Starts one more sequence, whose tokens ``matcher`` allows.

        Raises:
            ValueError: what the engine refuses.
            ApiError: 429 when it has too many tokens of prompts.
        """
        key = self._bridge.register(self, len(self._keys))
        seat = self._seats.pop()
        try:
            self._ids.append(self._bridge.submit(seat, key, prompt, params, experts_per_token, routed, matcher))
            self._prompt_tokens += len(prompt)
        except BaseException:
            self._bridge.forget([key])
            raise
        self._keys.append(key)
        self._left += 1

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the call when the block raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def push(self, index: int, progress: Progress) -> None:
        """Called by the bridge."""
        self._new_tokens += len(progress.token_ids)
        if progress.outcome is not None:
            self._left -= 1
            self._finish_reasons.append(_reason(progress.outcome))
            self._cached[index] = progress.outcome.timings.cached_tokens
        if waiting := self._pending.get(index):
            waiting.merge(progress)
        else:
            self._pending[index] = progress
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
        while self._left or self._pending:
            await self._news.wait()
            self._news.clear()
            pending, self._pending = self._pending, {}
            for item in pending.items():
                yield item

    async def generations(self) -> list[Generation]:
        """Waits for the ends of all sequences, and returns what came out.

        Raises:
            ApiError: as ``result_of``.
        """
        outcomes: dict[int, _C.Outcome] = {}
        async for index, progress in self:
            if progress.outcome is not None:
                outcomes[index] = progress.outcome
        return [result_of(outcomes[index]) for index in range(len(outcomes))]

    def cached_tokens(self, n: int) -> int:
        """Of the prompts, those that the cache had; each of ``n`` sequences, of which the first counts."""
        return sum(cached for index, cached in self._cached.items() if index % n == 0)

    def close(self) -> None:
        """Cancels what still runs. Nothing comes any more."""
        self._seats.clear()
        if (fields := logs.request_fields.get()) is not None:
            fields |= {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._new_tokens}
            fields["finish_reasons"] = self._finish_reasons
        if self._left:
            self._bridge.cancel(self._ids)
        self._bridge.forget(self._keys)
        self._left, self._pending = 0, {}


def result_of(outcome: _C.Outcome) -> Generation:
    """What came out of a sequence that ended by itself.

    Raises:
        ApiError: it failed, or was cancelled because the server stops.
    """
    try:
        generation = outcome.result()
    except MemoryError as error:
        raise ApiError(500, str(error), code="out_of_memory") from None
    except RankError as error:
        raise ApiError(500, f"the engine stopped: {error}", code="engine_dead") from None
    if generation.finish_reason == "error":
        raise ApiError(500, f"the model failed at this request: {generation.error}", code="numerical_error")
    if generation.finish_reason == "cancelled":
        raise ApiError(503, "the server is stopping", code="cancelled", headers={"Retry-After": "5"})
    return generation


class Bridge:
    """One per server; its methods are called on the event loop's thread.

    Attributes:
        recorder: gets the traces of all sequences; None: nothing is traced unless a request asks for it.
        replays: force their experts on the sequences that begin as they do; None: every sequence runs free.
        on_failure: called with the reason when the engine takes no more requests, before they end.
    """

    def __init__(self, model: Mixtral, metrics: Metrics) -> None:
        self.recorder: Recorder | None = None
        self.replays: _C.Replays | None = None
        self.on_failure: Callable[[str], None] = lambda reason: None
        self._engine = model.engine
        self._box = _C.EventBox()
        self._box.attach(self._engine)
        self._open: dict[int, tuple[Call, int]] = {}  # by key: the call, and which of its sequences
        self._constrained: dict[int, tuple[int, Matcher]] = {}  # by key: the engine's id
        self._due: list[Due] = []  # masks, of the events that are being drained
        self._masks = MaskThread(self._engine.allow)
        self._metrics = metrics
        self._observed: dict[int, SequenceTimes] = {}  # by key, until the sequence has ended
        self._next_key = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._box.fileno(), self._drain)

    def open(self, sequences: int) -> Call:
        """A call with seats for so many sequences: before any work is done for it, such as tokenizing.

        Raises:
            ApiError: 429 when there are not as many seats now; 400 when there never are.
        """
        try:
            return Call(self, self._engine.reserve_seats(sequences))
        except QueueFull:
            raise _queue_full() from None
        except ValueError as error:
            raise ApiError(400, f"n times the prompts: {error}", "n") from None

    def register(self, call: Call, index: int) -> int:
        self._next_key += 1
        self._open[self._next_key] = call, index
        return self._next_key

    def submit(
        self,
        seat: _C.Seat,
        key: int,
        prompt: Sequence[int],
        params: _C.SamplingParams,
        experts_per_token: int,
        routed: bool,
        matcher: Matcher | None = None,
    ) -> int:
        traced = routed or self.recorder is not None
        constrained = matcher is not None
        try:
            request = self._box.submit(
                self._engine, seat, key, prompt, params, experts_per_token, traced, constrained, self.replays
            )
        except QueueFull:
            raise _queue_full() from None
        if constrained:
            self._constrained[key] = request, matcher
            self._masks.push([Due(request, matcher)])
        self._observed[key] = self._metrics.sequence(len(prompt), params.max_tokens)
        return request

    def cancel(self, ids: Sequence[int]) -> None:
        for request in ids:
            self._engine.cancel(request)

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._open.pop(key, None)

    def progress(self) -> tuple[bool, int]:
        """Whether the engine has work, and how many tokens it has computed."""
        return bool(self._observed), self._engine.stats().computed_tokens

    def failure(self) -> str | None:
        """Why the engine takes no more requests."""
        return self._engine.failure()

    def close(self) -> None:
        self._loop.remove_reader(self._box.fileno())
        self._masks.close()

    def _drain(self) -> None:
        if (reason := self.failure()) is not None:
            self.on_failure(reason)
        for event in self._box.take():
            self._observe(event)
            refused = self._constrain(event)
            if self.recorder and event.outcome is not None:
                self.recorder.add(event.outcome)
            if entry := self._open.get(event.key):  # the call may have been closed
                call, index = entry
                progress = Progress(event)
                if refused is not None:
                    progress.outcome = refused
                if progress.outcome is not None:
                    del self._open[event.key]
                call.push(index, progress)
        if self._due:
            self._masks.push(self._due)
            self._due = []

    def _constrain(self, event: _C.Event) -> "_Refused | None":
        """Asks for the next mask of a constrained sequence. What it returns takes the place of the outcome."""
        if (constrained := self._constrained.get(event.key)) is None:
            return None
        request, matcher = constrained
        if event.outcome is None:
            if event.token_ids:
                self._due.append(Due(request, matcher, event.token_ids))
            return None
        del self._constrained[event.key]
        return _Refused(event.outcome, matcher.error) if matcher.error else None

    def _observe(self, event: _C.Event) -> None:
        if sequence := self._observed.get(event.key):
            sequence.progress(len(event.token_ids))
            if event.outcome is not None:
                sequence.end(_reason(event.outcome))
                del self._observed[event.key]


def _queue_full() -> ApiError:
    return ApiError(429, "too many requests wait; try again", code="queue_full", headers={"Retry-After": "1"})


class _Refused:
    """The outcome of a sequence whose grammar could not go on."""

    def __init__(self, outcome: _C.Outcome, reason: str) -> None:
        self.timings, self._reason = outcome.timings, reason

    def result(self) -> Generation:
        raise ApiError(400, self._reason, "response_format", "schema_too_complex")


def _reason(outcome: _C.Outcome) -> str:
    """stop, length, cancelled or error."""
    try:
        return outcome.result().finish_reason
    except Exception:
        return "error"
