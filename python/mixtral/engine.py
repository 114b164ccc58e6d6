"""Requests one by one: submitted from any thread, answered together, and called off."""

from collections.abc import Callable
from concurrent.futures import Future

from . import _C
from .model import Mixtral, keep_until_exit
from .prompts import Prompt, experts_or_default


class Request(Future[_C.Generation]):
    """What ``Engine.submit`` began: ``result()`` waits and gives the Generation, or raises what ended the request."""

    def __init__(self, engine: _C.Engine) -> None:
        super().__init__()
        self._engine = engine  # which would end its requests if nobody held it
        self._id = -1
        self.set_running_or_notify_cancel()  # cancel() then has no effect: Engine.abort ends a request


class Engine:
    """Continues prompts that come at different times. They run as one batch, which a request joins and leaves between
    two forward passes; a result does not depend on its neighbours.

        engine = mixtral.Engine(model, max_batch=8)
        request = engine.submit("Once", max_tokens=32)
        print(request.result().text)

    It has a key/value cache and a thread of its own, beside those of ``model.generate``. Threads may share it.
    """

    def __init__(self, model: Mixtral, **options: int | bool) -> None:
        """Args:
            model: what computes; it may have several engines.
            options: those of ``Mixtral``, such as ``max_batch``, ``kv_memory``, ``max_queue`` and ``speculate``.

        Raises:
            TypeError: an unknown option.
            ValueError: an option out of range.
            RuntimeError: on a rank other than 0.
        """
        model._check_process()
        self._model = model
        self._engine = keep_until_exit(_C.Engine(model._model, model.tokenizer, _C.EngineOptions(**options)))

    def submit(
        self,
        prompt: Prompt,
        *,
        on_text: Callable[[str], object] | None = None,
        experts_per_token: int | None = None,
        **sampling: object,
    ) -> Request:
        """Begin to continue one prompt, and return at once.

        Args:
            prompt: text, which gets a BOS token in front, or token ids.
            on_text: called with the text as it becomes certain, on the engine's thread.
            experts_per_token: another number of experts than the model's.
            sampling: as of ``Mixtral.generate``: ``max_tokens`` (default 64), ``temperature``, ``top_p``, ``top_k``,
                ``seed``, ``stop``, ``logprobs``, ``ignore_eos`` and so on.

        Returns:
            The request, a ``concurrent.futures.Future`` of its Generation.

        Raises:
            ValueError: an empty or too long prompt, an id outside the vocabulary, a parameter out of range, or text
                for a model without a tokenizer.
            TypeError: an unknown parameter.
            MemoryError: the key/value cache cannot hold the prompt and ``max_tokens``.
            QueueFull: there are ``max_queue`` requests already.
        """
        self._model._check_process()
        ids = self._model._prompt_ids(prompt)
        params = self._model._sampling_params(**{"max_tokens": 64, **sampling})
        request = Request(self._engine)

        def pass_on(text: str) -> bool:
            if on_text and text:
                on_text(text)
            return True

        def end(outcome: _C.Outcome) -> None:
            try:
                request.set_result(outcome.result())
            except Exception as error:
                request.set_exception(error)

        request._id = self._engine.submit(ids, params, experts_or_default(experts_per_token), pass_on, end)
        return request

    def abort(self, request: Request) -> None:
        """Call a request off: it ends with the text so far and ``finish_reason`` "cancelled". The others go on. Does
        nothing when it has ended already."""
        self._engine.cancel(request._id)
