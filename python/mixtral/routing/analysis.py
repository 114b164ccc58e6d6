"""All metrics of a trace: what ``metrics.json`` holds. docs/routing.md describes it."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .caching import Caching
from .capacity import capacity, expert_parallel
from .coactivation import coactivation
from .confidence import confidence
from .cross_layer import gate_recall, paths, transition
from .expert_load import expert_load
from .information import Causes
from .languages import languages as language_metrics
from .locality import Locality
from .saturation import check_same_text, saturation
from .statistics import CONFIDENCE
from .tokens import Tokens
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..trace import Trace

VERSION = 1  # of metrics.json


def analyse(
    trace: "Trace",
    *,
    layers: list[int] | None = None,
    languages: list[str] | None = None,
    reference: "Trace | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """The metrics of a trace, as ``metrics.json`` has them.

    Args:
        layers: those that are analysed; None: all.
        languages: the domains that are parallel texts. The other metrics are of the other domains, if there are any.
        reference: a trace of another checkpoint on the same tokens.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: an unknown layer, a domain of fewer than 20 tokens, or a ``reference`` of other tokens.
    """
    if reference is not None:
        check_same_text(trace, reference)
    languages = languages or []
    names = [name for name in trace.domain_names if name not in languages] or trace.domain_names
    tokens = Tokens(trace, names, layers)
    of_languages = Tokens(trace, languages, layers) if languages else None
    causes, locality = Causes(tokens), Locality(tokens)
    vocabulary, caching = Vocabulary(tokens), Caching(tokens)

    found = []
    for index, number in enumerate(tokens.layers):
        metrics = {
            "layer": number,
            "load": expert_load(tokens, index),
            "locality": locality.measure(index),
            "information": causes.information(index),
            "vocabulary": vocabulary.measure(index),
            "coactivation": coactivation(tokens, index),
            "transition": transition(tokens, index) if index + 1 < len(tokens.layers) else None,
            "gate_recall": gate_recall(tokens, index),
            "languages": language_metrics(of_languages, index) if of_languages else None,
            "confidence": confidence(tokens, index),
            "caching": caching.measure(index),
            "expert_parallel": expert_parallel(tokens, index),
            "capacity": capacity(tokens, index),
            "saturation": None if reference is None else saturation(tokens, reference, index),
        }
        found.append({name: value for name, value in metrics.items() if value is not None})
        if progress:
            progress(index + 1, len(tokens.layers))
    sizes = np.bincount(tokens.domain, minlength=len(names))
    head = {
        "version": VERSION,
        "model": trace.model,
        "tokenizer": trace.tokenizer,
        "experts": tokens.num_experts,
        "top_k": tokens.top_k,
        "domains": {name: int(size) for name, size in zip(names, sizes, strict=True)},
        "languages": languages,
        "confidence": CONFIDENCE,
        "permutations": causes.permutations,
    }
    return plain(head | {"layers": found, "paths": paths(tokens)})


def plain(value: object) -> object:
    """The same for JSON: NumPy's types as Python's, NaN and infinity as None, seven digits, twelve places at most."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{round(value, 12) + 0.0:.7g}") if math.isfinite(value) else None
    return value
