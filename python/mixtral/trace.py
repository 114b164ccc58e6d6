"""Which experts every token went to: what ``Mixtral.trace`` returns, and its file."""

from dataclasses import dataclass, fields
from os import PathLike

from torch import Tensor

from . import _C


@dataclass(eq=False, repr=False)
class Trace:
    """N tokens of several documents, one document after the other, with the routing of L layers and K experts a token.

    Attributes:
        token_ids: int32 [N].
        predicted_ids: int32 [N], the model's most likely next token; -1 where its logits were not computed.
        positions: int32 [N], in the sequence that the model read; 0 begins a sequence.
        docs: int32 [N], the number of the document; a long one may be several sequences.
        domains: uint8 [N], of the document: an index of ``domain_names``.
        special: bool [N], BOS and other control tokens; ``topk_ids[~special]`` leaves them out.
        topk_ids: uint8 [N, L, K], falling weights, ties to the smaller id.
        topk_weights: float16 [N, L, K], rounded from the float32 that the model computed with.
        router_logits: float16 [N, L, num_experts], or None.
        next_gate_ids: uint8 [N, L - 1, K], or None: the experts that layer l + 1's router chooses from what the router
            of layer l reads.
        domain_names: the names of the domains.
        num_experts: of a layer.
        model: a fingerprint of the model, in hexadecimal digits.
        tokenizer: its kind and size in words; "" without one.
    """

    token_ids: Tensor
    predicted_ids: Tensor
    positions: Tensor
    docs: Tensor
    domains: Tensor
    special: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    router_logits: Tensor | None
    next_gate_ids: Tensor | None
    domain_names: list[str]
    num_experts: int
    model: str
    tokenizer: str

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file (docs/routing.md, "The trace file"). It replaces an older one whole or not at all.

        Raises:
            RuntimeError: the file cannot be written.
            ValueError: tensors whose shapes do not fit each other.
        """
        _C.write_trace(self._fields(), path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Trace":
        """Read what ``save`` or ``mixtral generate --trace`` wrote.

        Raises:
            LoadError: the file is cut short, no trace, or its parts do not fit each other.
        """
        return cls(**_C.read_trace(path))

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        _, layers, top_k = self.topk_ids.shape
        documents = len(self.docs.unique())
        return f"Trace({len(self)} tokens of {documents} documents, {layers} layers, {top_k} of {self.num_experts})"

    def _fields(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
