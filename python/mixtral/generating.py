"""The methods of the model that generate text."""

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike

from . import _C
from .prompts import Prompt, experts_or_default, prompt_list


class Generating:
    """A base of ``Mixtral``."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int = 0,
        ignore_eos: bool = False,
        on_text: Callable[[int, str], bool | None] | None = None,
        generation_config: bool = False,
        experts_per_token: int | None = None,
        return_routed_experts: bool = False,
        *,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        prompt_logprobs: int = 0,
    ) -> list[_C.Generation]:
        """Continue each prompt; the prompts run as one batch, and a result does not depend on its neighbours.

        Threads may call this at the same time: their prompts run as one batch too.

        Args:
            prompts: one prompt or several. Text gets a BOS token in front; token ids, integers of any type also as a
                NumPy array or tensor [N] or [B, N], are used as they are.
            max_tokens: new tokens of each prompt, at most.
            temperature: 0, the default, takes the most probable token.
            top_p: (0, 1]; sample from the fewest tokens with this probability together. Default 1.
            top_k: sample from the k most probable tokens; 0, the default: off.
            min_p: [0, 1]; drop tokens less probable than this share of the most probable one. Default 0.
            repetition_penalty: > 0; tokens already seen become less likely above 1, the default.
            seed: of the random numbers; None or -1: taken from the operating system.
            stop: generation ends before any of these texts.
            logprobs: 0: none; n: of each new token and of the n most likely at its place.
            ignore_eos: go on after the end-of-sequence token.
            on_text: called with (index of the result, text) as text becomes certain, on a thread of the engine. False
                cancels that result; the others go on, and so does one whose call returns nothing. It must not call
                ``generate``.
            generation_config: take the five sampling parameters that are not given here from the model's
                generation_config.json (``sampling_defaults``).
            experts_per_token: another number of experts than the model's.
            return_routed_experts: keep the experts of every token and layer, as ``routed_experts`` of the result: uint8
                [tokens, layers, experts per token]. The tokens are those that the model read: prompt and new ones,
                but for the newest.
            n: continue each prompt this many times, each with its own random numbers.
            presence_penalty, frequency_penalty: [-2, 2]; subtracted from the logit of a generated token, once and once
                for each time that it was generated (as in OpenAI's API).
            logit_bias: token id -> [-100, 100], added to its logit after the penalties.
            min_tokens: among so many new tokens is none that would end the generation, and ``stop`` does not end it.
            stop_token_ids: generation ends before any of these tokens too, even with ``ignore_eos``.
            prompt_logprobs: 0: none; n: of each token of the prompt and of the n most likely at its place.

        Returns:
            One result for each prompt, or ``n`` of the first prompt, then ``n`` of the next: ``text``, ``token_ids``,
            ``finish_reason``, ``logprobs``, ``prompt_logprobs`` (None for the first token), ``routed_experts``.

        Raises:
            ValueError: an empty or too long prompt, an id outside the vocabulary, a parameter out of range, or text
                for a model without a tokenizer.
            MemoryError: the key/value cache cannot hold a prompt and ``max_tokens``.
        """
        params = self._sampling_params(
            generation_config=generation_config,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            prompt_logprobs=prompt_logprobs,
        )
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        self._check_process()
        ids = [self._prompt_ids(prompt) for prompt in prompt_list(prompts)]
        k = experts_or_default(experts_per_token)
        generations, self.timings = self._engine.generate(ids, params, k, return_routed_experts, on_text, n)
        return generations

    def stream(self, prompt: Prompt, **options: object) -> Iterator[str]:
        """Continue one prompt, text by text as it becomes certain. Closing the iterator ends the work.

        Args:
            prompt: text or token ids.
            options: those of ``generate``, without ``on_text``, ``return_routed_experts`` and ``n``.

        Raises:
            ValueError, MemoryError: as ``generate``, when the first piece is asked for; ValueError for a model
                without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("stream: model expected a tokenizer, got none; use generate for token ids")
        self._check_process()
        return self._pieces(self._prompt_ids(prompt), **options)

    def save_prompt_cache(self, prompt: Prompt, path: str | PathLike[str]) -> None:
        """Write the keys and values of a prompt that ``generate`` has read into a file, as far as they are still in the
        cache: those of full pages. Another process goes on from it with ``load_prompt_cache``, to the same bits on the
        same kind of processor. New tokens may be part of ``prompt``.

        Raises:
            RuntimeError: the file cannot be written; it is then as it was.
        """
        self._check_process()
        self._engine.save_prompt_cache(self._prompt_ids(prompt), path)

    def load_prompt_cache(self, path: str | PathLike[str]) -> None:
        """Read a file of ``save_prompt_cache``: prompts that begin with its tokens compute only what comes after them.

        Raises:
            LoadError: the file is damaged, or of another model, type or device.
            MemoryError: the key/value cache has no room for it.
        """
        self._check_process()
        self._engine.load_prompt_cache(path)

    def _pieces(
        self,
        prompt_ids: list[int],
        experts_per_token: int | None = None,
        **options: object,
    ) -> Iterator[str]:
        events: queue.SimpleQueue[str | _C.Outcome] = queue.SimpleQueue()  # filled on the engine's thread

        def on_text(piece: str) -> bool:
            events.put(piece)
            return True

        k = experts_or_default(experts_per_token)
        params = self._sampling_params(**options)
        request = self._engine.submit(prompt_ids, params, k, on_text, events.put)
        event: str | _C.Outcome = ""
        try:
            while isinstance(event := events.get(), str):
                if event:
                    yield event
        finally:
            self._engine.cancel(request)
            while isinstance(event, str):
                event = events.get()
            self.timings = event.timings
        event.result()  # raises what ended the request

    def _sampling_params(
        self,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        generation_config: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        stop_token_ids: Sequence[int] = (),
        **fields: object,
    ) -> _C.SamplingParams:
        defaults = self.sampling_defaults if generation_config else {}
        given = {name: value for name, value in fields.items() if value is not None}
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        return _C.SamplingParams(
            stop=stops,
            seed=None if seed == -1 else seed,
            logit_bias=dict(logit_bias or {}),
            stop_token_ids=list(stop_token_ids),
            **{**defaults, **given},
        )
