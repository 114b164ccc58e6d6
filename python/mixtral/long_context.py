"""How a model uses a long text: loss by context, passkey retrieval, and how far back it looks at all.

    from mixtral import figures, long_context
    result = long_context.perplexity(model, text, contexts=[64, 128, 256, 512])
    figures.draw("perplexity", result, "loss.svg")

Each function gives the object that the binary's command of the same name prints with ``--json``. docs/long_context.md
explains protocols and fields.
"""

import json
from collections.abc import Sequence

from . import _C
from .model import Mixtral


def perplexity(
    model: Mixtral,
    documents: str | Sequence[str | Sequence[int]],
    contexts: Sequence[int],
    protocol: str = "fixed",
    targets: str = "",
    *,
    ctx_size: int = 0,
    chunk_size: int = _C.CHUNK_SIZE,
) -> dict:
    """The loss of texts by how much of them the model sees.

    Args:
        documents: a text, or several, each as text or as token ids without BOS. Those shorter than the longest context
            are left out.
        contexts: tokens of context, BOS included.
        protocol: "fixed", "sliding:S", "buckets" or "disjoint".
        targets: "last:N" scores the last N tokens of each document, "all" all of them; by default "last:256" for fixed
            and sliding, else "all".
        ctx_size: longest context allowed; 0: what the model was made for.
        chunk_size: tokens in one forward pass; it does not change the result.

    Returns:
        ``{"protocol", "contexts": [{"context", "nll", "perplexity", "bits_per_byte", "standard_error", "targets",
        "change", "mean_of_window_means"}], "documents", "skipped", "standard_error_over", "window", "reach"}``.
        ``nll`` is in nats per token. ``bits_per_byte`` is None where a document came as ids.

    Raises:
        ValueError: an unknown protocol, an option out of range, no document as long as the longest context, or text
            for a model without a tokenizer.
    """
    texts = [documents] if isinstance(documents, str) else list(documents)
    pairs = [_ids_and_bytes(model, text) for text in texts]
    bos = model.config.bos_token_id if model.tokenizer is None else model.tokenizer.bos_id
    model._check_process()
    result = json.loads(
        _C.context_perplexity(
            model._model,
            bos,
            [ids for ids, _ in pairs],
            [counts for _, counts in pairs],
            contexts,
            protocol,
            targets,
            ctx_size,
            chunk_size,
        )
    )
    if not all(isinstance(text, str) for text in texts):
        for row in result["contexts"]:
            row["bits_per_byte"] = None
    return result


def passkey(
    model: Mixtral,
    lengths: Sequence[int],
    depths: int = 11,
    trials: int = 10,
    style: str = "landmark",
    digits: int = 0,
    distances: int = 32,
    *,
    seed: int = 0,
    ctx_size: int = 0,
    chunk_size: int = _C.CHUNK_SIZE,
) -> dict:
    """Hide a number in a text, ask for it at the end, and count the right answers.

    Args:
        lengths: of the prompts, in tokens, BOS included.
        depths: places of the number, evenly from the first to the last.
        trials: numbers for each length and depth.
        style: "landmark", or "ruler" (its task niah_single_1).
        digits: of a number; 0: 5 for landmark, 7 for ruler.
        distances: so many distances, evenly up to the longest length, decide ``k_max``; 0: the cells do.
        seed: of the numbers.
        ctx_size: longest prompt allowed; 0: what the model was made for.
        chunk_size: tokens in one forward pass.

    Returns:
        ``{"style", "digits", "cells": [{"length", "depth", "distance", "trials", "correct", "low", "high",
        "logprob"}], "distances", "k_max", "chance", "chance_logprob", "window", "reach"}``. ``low`` and ``high`` are
        Wilson's interval at 95 %.

    Raises:
        ValueError: an option out of range, a length without room for the prompt, or a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("passkey: model expected a tokenizer, got none")
    model._check_process()
    return json.loads(
        _C.passkey(
            model._model,
            model.tokenizer,
            lengths,
            depths,
            trials,
            style,
            digits,
            distances,
            seed,
            ctx_size,
            chunk_size,
        )
    )


def reach(model: Mixtral, trials: int = 4, *, ctx_size: int = 0, seed: int = 0) -> dict:
    """Replace one token of a random text, and see which outputs get other bits.

    The smallest changes are lost in the rounding of 16 bits: load the model with ``dtype="float32"``.

    Args:
        trials: random texts.
        ctx_size: most tokens of a text; 0: what the model was made for.
        seed: of the texts.

    Returns:
        ``{"window", "layers", "reach", "changed": {distance: share}, "farthest"}``; the distances are strings.
        ``reach`` is layers * (window - 1), None without a window.

    Raises:
        ValueError: an option out of range.
    """
    model._check_process()
    return json.loads(_C.reach(model._model, trials, ctx_size, seed))


def _ids_and_bytes(model: Mixtral, document: str | Sequence[int]) -> tuple[list[int], list[int]]:
    if not isinstance(document, str):
        ids = [int(token) for token in document]
        return ids, [1] * len(ids)
    if model.tokenizer is None:
        raise ValueError("perplexity: documents expected token ids (the model has no tokenizer), got text")
    return _C.ids_and_bytes(model.tokenizer, document)
