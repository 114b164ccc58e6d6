"""The methods of the model that keep what its routers decide, and that repeat it."""

from collections.abc import Callable, Sequence

from torch import Tensor

from . import _C
from .prompts import Prompt, experts_or_default, prompt_list
from .trace import Trace


class Tracing:
    """A base of ``Mixtral``."""

    def trace(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        domains: Sequence[str] | None = None,
        logits: bool = False,
        experts_per_token: int | None = None,
        ctx_size: int = 0,
        chunk_size: int = _C.CHUNK_SIZE,
        progress: Callable[[int, int], None] | None = None,
    ) -> Trace:
        """Run texts through the model and keep what its routers decide. Many short ones share a forward pass.

        Args:
            prompts: one document or several. Text gets a BOS token in front; one that is longer than the context is cut
                into sequences of at most ``ctx_size`` tokens, each behind a BOS token of its own. Token ids are used as
                they are.
            domains: the name of each document's domain; None: all are "text".
            logits: keep ``router_logits`` and ``next_gate_ids`` too.
            experts_per_token: another number of experts than the checkpoint's.
            ctx_size: tokens of a sequence, BOS included; 0: what the model was made for.
            chunk_size: tokens in one forward pass; it bounds the memory and does not change the result.
            progress: called with (tokens done, tokens in all) after each pass.

        Raises:
            ValueError: a model without experts, an empty document, ids that are too long or outside the vocabulary, or
                an argument out of range.
            MemoryError: the key/value cache does not fit the device.
        """
        documents = prompt_list(prompts)
        names = ["text"] * len(documents) if domains is None else list(domains)
        if len(names) != len(documents):
            raise ValueError(
                f"trace: domains must be one name for each of {len(documents)} documents, got {len(names)}"
            )
        domain_names = list(dict.fromkeys(names))
        if len(domain_names) > 256:
            raise ValueError(f"trace: domains must have at most 256 names, got {len(domain_names)}")
        context = ctx_size or self.config.max_position
        if not 2 <= context <= self.config.max_position:
            raise ValueError(f"trace: ctx_size must be in [2, {self.config.max_position}], got {ctx_size}")
        ids: list[list[int]] = []
        docs: list[int] = []
        for doc, prompt in enumerate(documents):
            parts = self._sequences(prompt, context)
            ids += parts
            docs += [doc] * len(parts)
        self._check_process()
        domain_of = [domain_names.index(name) for name in names]
        domain_ids = [domain_of[doc] for doc in docs]
        k = experts_or_default(experts_per_token)
        found = _C.trace(
            self._model, self.tokenizer, ids, docs, domain_ids, domain_names, logits, k, chunk_size, progress
        )
        return Trace(**found)

    def replay(
        self, trace: Trace, *, chunk_size: int = _C.CHUNK_SIZE, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Run the tokens of a trace through the experts that it names.

        A token whose recorded experts are those that the router chooses keeps the router's weights, so the logits of an
        unchanged trace are those of the traced run, bit for bit. Elsewhere the weights are the router's softmax over
        the recorded experts.

        Args:
            trace: of this model; its ``topk_ids`` may be changed.
            chunk_size, progress: as of ``trace``.

        Returns:
            float32 [N, vocab], the logits after every token, on the CPU.

        Raises:
            ValueError: a trace of another model, or whose parts do not fit each other.
            MemoryError: the key/value cache does not fit the device.
        """
        self._check_process()
        return _C.replay(self._model, trace._fields(), chunk_size, progress)

    def _sequences(self, prompt: Prompt, context: int) -> list[list[int]]:
        """The sequences of a document: one, or several where a text does not fit the context."""
        ids = self._prompt_ids(prompt)
        if not isinstance(prompt, str) or len(ids) <= context:
            return [ids]
        bos, text = ids[:1], ids[1:]
        return [bos + text[begin : begin + context - 1] for begin in range(0, len(text), context - 1)]
