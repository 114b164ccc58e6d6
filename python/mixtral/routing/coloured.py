"""Text coloured by expert: Fig. 8 of the Mixtral paper, for a terminal and for the report."""

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from ..trace import Trace

TOKENS = 300  # shown of each domain
# Background colours of the 256-colour palette on which black is readable, for eight experts and more.
ANSI = (217, 223, 229, 157, 159, 153, 189, 225, 180, 144, 150, 116, 110, 146, 182, 252)


def shown_layers(layers: list[int]) -> list[int]:
    """First, middle and last, as in the paper."""
    return sorted({layers[0], layers[(len(layers) - 1) // 2], layers[-1]})


def piece_text(tokenizer: "Tokenizer | None", token_id: int) -> str:
    """What a token stands for: a space for SentencePiece's low bar, a dot for a byte that is no character alone."""
    if tokenizer is None:
        return f"{token_id} "
    piece = tokenizer.piece(token_id)
    if not tokenizer.is_byte(token_id):
        return piece.replace("\u2581", " ")
    byte = int(piece[3:5], 16)  # "<0x0A>"
    return chr(byte) if byte == 10 or 32 <= byte < 127 else "\u00b7"


def ansi(trace: "Trace", tokenizer: "Tokenizer | None", layers: list[int] | None = None) -> str:
    """The beginning of each domain's text for a terminal, the background telling the first choice.

    Args:
        layers: None: first, middle and last.

    Raises:
        ValueError: an unknown layer.
    """
    num_layers = trace.topk_ids.shape[1]
    if wrong := [layer for layer in layers or [] if layer >= num_layers]:
        raise ValueError(f"--layers: expected layers in [0, {num_layers - 1}], got {wrong[0]}")
    legend = " ".join(_painted(expert, f" {expert} ") for expert in range(trace.num_experts))
    lines = [f"experts: {legend}\n"]
    for layer in layers or shown_layers(list(range(num_layers))):
        for name, rows in _beginnings(trace):
            experts = trace.topk_ids[rows, layer, 0].tolist()
            pieces = [piece_text(tokenizer, i) for i in trace.token_ids[rows].tolist()]
            text = "".join(map(_painted, experts, pieces))
            lines.append(f"\nlayer {layer}, {name}\n{text}\n")
    return "".join(lines)


def html(trace: "Trace", tokenizer: "Tokenizer | None", layers: list[int]) -> str:
    """The same for the report; hovering over a token shows its id, experts and weights."""
    parts = []
    for layer in shown_layers(layers):
        for name, rows in _beginnings(trace):
            ids = trace.token_ids[rows].tolist()
            experts, weights = trace.topk_ids[rows, layer].tolist(), trace.topk_weights[rows, layer].tolist()
            spans = []
            for token_id, chosen, shares in zip(ids, experts, weights, strict=True):
                both = ", ".join(f"expert {e}: {w:.2f}" for e, w in zip(chosen, shares, strict=True))
                text = escape(piece_text(tokenizer, token_id))
                spans.append(f'<span class="e{chosen[0]}" title="token {token_id}; {both}">{text}</span>')
            parts.append(f'<h3>Layer {layer}, {escape(name)}</h3><p class="tokens">{"".join(spans)}</p>')
    return "".join(parts)


def styles(num_experts: int) -> str:
    """The colours of the experts, light and dark."""
    hues = [expert * 360 // num_experts for expert in range(num_experts)]
    light = "".join(f".e{expert}{{background:hsl({hue} 75% 84%)}}" for expert, hue in enumerate(hues))
    dark = "".join(f".e{expert}{{background:hsl({hue} 45% 28%)}}" for expert, hue in enumerate(hues))
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _beginnings(trace: "Trace") -> Iterator[tuple[str, np.ndarray]]:
    special, domains = np.asarray(trace.special).astype(bool), np.asarray(trace.domains)
    for index, name in enumerate(trace.domain_names):
        yield name, np.flatnonzero((domains == index) & ~special)[:TOKENS]


def _painted(expert: int, text: str) -> str:
    """In the expert's colour; a line's end is left as it is."""
    start = f"\x1b[30;48;5;{ANSI[expert % len(ANSI)]}m"
    return "\n".join(f"{start}{part}\x1b[0m" if part else "" for part in text.split("\n"))
