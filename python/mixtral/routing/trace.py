"""A routing trace: which experts each token went to, in memory and as ``trace.safetensors``."""

import json
import os
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import numpy as np

from ..errors import LoadError

# Tensor -> (dtype, shape); N tokens, L layers, K chosen experts, E experts.
TENSORS = {
    "token_id": ("int32", "N"),  # read at this position
    "predicted_id": ("int32", "N"),  # the most likely next token
    "position": ("int32", "N"),  # in its document
    "doc": ("int32", "N"),
    "domain": ("uint8", "N"),  # index into `domains`
    "special": ("uint8", "N"),  # 1: BOS and the like, left out of every metric
    "topk_ids": ("uint8", "NLK"),  # the most probable expert first
    "topk_weights": ("float16", "NLK"),
    "router_logits": ("float16", "NLE"),  # optional
}
OPTIONAL = ("router_logits",)


@dataclass
class Trace:
    """What the router did with N tokens in L layers; ``TENSORS`` lists dtypes and shapes.

    Attributes:
        num_experts: E.
        layers: the number in the model of each of the L layers.
        domains: names; ``domain`` holds indices into them.
        languages: those of ``domains`` that are parallel texts in several languages.
        model: what made the trace; empty when unknown.
    """

    token_id: np.ndarray
    predicted_id: np.ndarray
    position: np.ndarray
    doc: np.ndarray
    domain: np.ndarray
    special: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    router_logits: np.ndarray | None = None
    num_experts: int = 0
    layers: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    model: str = ""

    def __post_init__(self) -> None:
        self.num_experts = self.num_experts or _count_experts(self)
        self.layers = self.layers or list(range(self.topk_ids.shape[1]))
        self.domains = self.domains or [f"domain{i}" for i in range(int(self.domain.max(initial=0)) + 1)]

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[2]

    def rows(self, keep: np.ndarray) -> "Trace":
        """The tokens that the mask or the indices ``keep`` select."""
        chosen = {name: getattr(self, name)[keep] for name in TENSORS if getattr(self, name) is not None}
        return replace(self, **chosen)

    def with_layers(self, wanted: list[int]) -> "Trace":
        """These layers alone.

        Raises:
            ValueError: a layer that the trace does not have.
        """
        for layer in wanted:
            if layer not in self.layers:
                raise ValueError(f"--layers: expected layers out of {_ranges(self.layers)}, got {layer}")
        at = [self.layers.index(layer) for layer in wanted]
        cut = {
            name: getattr(self, name)[:, at]
            for name in ("topk_ids", "topk_weights", "router_logits")
            if getattr(self, name) is not None
        }
        return replace(self, layers=list(wanted), **cut)


def read_trace(path: str | PathLike[str]) -> Trace:
    """Read ``trace.safetensors``.

    Raises:
        LoadError: no such file, no safetensors, cut short, or not a trace; it names the tensor and the reason.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise _error(path, "", "no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            tensors = {name: file.get_tensor(name) for name in TENSORS if name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _error(path, "", f"no routing trace: {str(error).splitlines()[0]}") from None
    _check(path, tensors)
    try:
        known = {name: json.loads(metadata[name]) for name in ("layers", "domains", "languages") if name in metadata}
        experts = int(metadata.get("num_experts", 0))
    except ValueError as error:
        raise _error(path, "metadata", str(error)) from None
    trace = Trace(**tensors, num_experts=experts, model=metadata.get("model", ""), **known)
    _check_values(path, trace)
    return trace


def write_trace(trace: Trace, path: str | PathLike[str]) -> None:
    """Write ``trace.safetensors``; the file appears whole or not at all."""
    from safetensors.numpy import save_file

    tensors = {name: getattr(trace, name) for name in TENSORS if getattr(trace, name) is not None}
    tensors = {name: np.ascontiguousarray(tensor, TENSORS[name][0]) for name, tensor in tensors.items()}
    metadata = {name: json.dumps(getattr(trace, name)) for name in ("layers", "domains", "languages")}
    part = Path(f"{path}.part")
    save_file(tensors, part, metadata | {"num_experts": str(trace.num_experts), "model": trace.model})
    os.replace(part, path)


def _error(path: str | PathLike[str], item: str, reason: str) -> LoadError:
    place = f"{path}: {item}" if item else f"{path}"
    return LoadError(f"{place}: {reason}", str(path), item, reason)


def _check(path: str | PathLike[str], tensors: dict[str, np.ndarray]) -> None:
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in TENSORS.items():
        if name not in tensors:
            if name in OPTIONAL:
                continue
            raise _error(path, name, "missing: this is no routing trace")
        tensor = tensors[name]
        if str(tensor.dtype) != dtype or tensor.ndim != len(shape):
            raise _error(path, name, f"expected {dtype} [{', '.join(shape)}], got {tensor.dtype} {list(tensor.shape)}")
        for letter, size in zip(shape, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise _error(path, name, f"expected {letter} = {sizes[letter]}, got shape {list(tensor.shape)}")


def _check_values(path: str | PathLike[str], trace: Trace) -> None:
    largest, domain = int(trace.topk_ids.max(initial=0)), int(trace.domain.max(initial=0))
    if largest >= trace.num_experts:
        raise _error(path, "topk_ids", f"expected ids below {trace.num_experts}, got {largest}")
    if domain >= len(trace.domains):
        raise _error(path, "domain", f"expected an index below {len(trace.domains)}, got {domain}")
    if len(trace.layers) != trace.topk_ids.shape[1]:
        raise _error(path, "layers", f"expected {trace.topk_ids.shape[1]} numbers, got {len(trace.layers)}")


def _count_experts(trace: Trace) -> int:
    if trace.router_logits is not None:
        return trace.router_logits.shape[2]
    return max(int(trace.topk_ids.max(initial=0)) + 1, trace.top_k)


def _ranges(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first} to {last}" if numbers == list(range(first, last + 1)) else ", ".join(map(str, numbers))
