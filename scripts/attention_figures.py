"""Draws the figures of docs/attention.md from what the operators really do: docs/figures/*.svg.

A mask is found by probing: with queries and keys of zeros all visible keys weigh the same, and with one-hot values the
output of a query has a number other than 0 exactly where it sees a key.

    .venv/bin/python scripts/attention_figures.py [FOLDER]
"""

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

import mixtral
from mixtral import ops

ROOT = Path(__file__).resolve().parents[1]
CELL, GAP, LEFT, TOP = 18, 48, 64, 44  # pixels
# Fill of a cell: nothing, then one colour for each sequence or chunk; "stale": memory that nothing reads.
COLORS = {"a": "#3b78b8", "b": "#c8741e", "c": "#4d9a5b", "stale": "#9a9a9a55"}


@dataclass
class Panel:
    """A grid of cells: rows look, columns are looked at."""

    title: str
    rows: list[str]
    columns: list[str]
    fills: list[list[str]]  # keys of COLORS, or ""
    texts: list[list[str]] | None = None  # in the cells


def one_hot_values(count: int) -> torch.Tensor:
    """-> [count, 1, D]: value j is 1 in column j. D is even and at least ``count``."""
    return torch.eye(count, count + count % 2)[:, None]


def zeros_like_values(tokens: int, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tokens, 1, values.size(2))


def seen(out: torch.Tensor, keys: int) -> list[list[bool]]:
    """out [Tq, 1, D] of one-hot values -> for each query, whether it sees key j."""
    return (out[:, 0, :keys] > 0).tolist()


def packed_mask(lengths_q: list[int], lengths_k: list[int], window: int = 0, causal: bool = True) -> list[list[bool]]:
    """The mask of ``sliding_window_attention`` over packed sequences."""
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    values = one_hot_values(sum(lengths_k))
    q, k = zeros_like_values(sum(lengths_q), values), zeros_like_values(sum(lengths_k), values)
    return seen(ops.sliding_window_attention(q, k, values, cu_q, cu_k, window, causal), sum(lengths_k))


class Cache:
    """A pool of pages for some sequences, each with a ring of columns, driven through the cache's operators."""

    def __init__(self, pages: int, page_size: int, columns: int, sequences: int, window: int) -> None:
        self.page_size, self.window = page_size, window
        self.values = one_hot_values(pages * page_size)  # of every slot of the pool, in case something is written there
        shape = (pages, page_size, 1, self.values.size(2))
        self.k_pool, self.v_pool = torch.zeros(shape), torch.zeros(shape)
        self.free = list(range(pages))
        self.table = torch.full((sequences, columns), -1)
        self.lengths = [0] * sequences
        self.held: dict[int, tuple[int, int]] = {}  # slot -> sequence, position

    def feed(self, counts: list[int]) -> torch.Tensor:
        """The next ``counts[b]`` tokens of each sequence b: write, then attend. -> [T, 1, D]"""
        slots = []
        for b, count in enumerate(counts):
            for position in range(self.lengths[b], self.lengths[b] + count):
                column = position // self.page_size % self.table.size(1)
                if position % self.page_size == 0:
                    if (old := int(self.table[b, column])) >= 0:  # wholly behind the window: back to the pool
                        self.free.append(old)
                    self.table[b, column] = self.free.pop(0)
                slots.append(int(self.table[b, column]) * self.page_size + position % self.page_size)
                self.held[slots[-1]] = (b, position)
            self.lengths[b] += count
        new = self.values[slots]
        zeros = zeros_like_values(len(slots), new)
        ops.rolling_kv_cache_write(self.k_pool, self.v_pool, zeros, new, torch.tensor(slots))
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0)
        return ops.rolling_kv_cache_attention(
            zeros, self.k_pool, self.v_pool, self.table, cu_seqlens, torch.tensor(self.lengths), self.window
        )


def names(lengths: list[int]) -> list[str]:
    return [f"{'abc'[b]}{i}" for b, length in enumerate(lengths) for i in range(length)]


def coloured(mask: list[list[bool]], owners: list[str]) -> list[list[str]]:
    return [[owners[r] if visible else "" for visible in row] for r, row in enumerate(mask)]


def owners(lengths: list[int]) -> list[str]:
    return ["abc"[b] for b, length in enumerate(lengths) for _ in range(length)]


def window_panels() -> list[Panel]:
    positions = [str(i) for i in range(10)]
    return [
        Panel(title, positions, positions, coloured(packed_mask([10], [10], window), ["a"] * 10))
        for title, window in [("no window", 0), ("window of 4 keys", 4)]
    ]


def mask_panels() -> list[Panel]:
    lengths = [4, 2, 3]
    tokens = names(lengths)
    causal = packed_mask(lengths, lengths)
    full = packed_mask(lengths, lengths, causal=False)
    panels = [
        Panel("BlockDiagonalCausalMask", tokens, tokens, coloured(causal, owners(lengths))),
        Panel("BlockDiagonalMask", tokens, tokens, coloured(full, owners(lengths))),
    ]
    cache = Cache(pages=6, page_size=2, columns=3, sequences=3, window=0)
    cache.feed([2, 1, 2])
    cache.feed([1, 0, 0])  # so that the pages of sequence a lie apart
    mask = seen(cache.feed([1, 1, 1]), 12)
    slots = ["abc"[cache.held[s][0]] + str(cache.held[s][1]) if s in cache.held else "" for s in range(12)]
    panels.append(
        Panel("BlockDiagonalCausalWithOffsetPaddedKeysMask", ["a3", "b1", "c2"], slots, coloured(mask, list("abc")))
    )
    return panels


def rolling_panels() -> list[Panel]:
    window, page_size, columns, tokens = 4, 2, 3, 11
    cache = Cache(pages=columns, page_size=page_size, columns=columns, sequences=1, window=window)
    slots = columns * page_size
    fills, texts = [], []
    for _ in range(tokens):
        mask = seen(cache.feed([1]), slots)[0]
        fills.append([("a" if mask[s] else "stale") if s in cache.held else "" for s in range(slots)])
        texts.append([str(cache.held[s][1]) if s in cache.held else "" for s in range(slots)])
    rows = [f"token {i}" for i in range(tokens)]
    pages = [f"p{s // page_size}" for s in range(slots)]
    return [Panel("three pages of 2 tokens, a window of 4", rows, pages, fills, texts)]


def chunk_panels() -> list[Panel]:
    window, length, page_size = 5, 12, 2
    positions = [str(i) for i in range(length)]
    panels = []
    for chunks in ([12], [5, 4, 3], [1] * 12):
        cache = Cache(pages=8, page_size=page_size, columns=8, sequences=1, window=window)
        fills: list[list[str]] = []
        for number, count in enumerate(chunks):
            out = cache.feed([count])
            slot_of = {position: slot for slot, (_, position) in cache.held.items()}
            visible = seen(out, cache.values.size(0))
            for row in visible:
                mask = [p in slot_of and row[slot_of[p]] for p in range(length)]
                fills.append(["abc"[number % 3] if seen_key else "" for seen_key in mask])
        title = {1: "whole", 3: "chunks of 5, 4 and 3", 12: "token by token"}[len(chunks)]
        panels.append(Panel(title, positions, positions, fills))
    return panels


def dependence(layers: int, window: int, length: int) -> list[list[bool]]:
    """[output][input]: whether the output's bits change when the input token is replaced, in a random f32 model."""
    config = mixtral.Config(
        hidden_size=64,
        intermediate_size=64,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=64,
        max_position=length,
        num_experts=4,
        top_k=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        window=window,
        dtype="float32",
    )
    model = mixtral.Mixtral.from_config(config)
    ids = torch.arange(length)[None] % 64
    logits = model(ids)[0]
    columns = []
    for at in range(length):
        other = ids.clone()
        other[0, at] += 1
        columns.append((model(other)[0] != logits).any(1))
    return torch.stack(columns, 1).tolist()


def reach_panels() -> list[Panel]:
    window, length = 4, 14
    positions = [str(i) for i in range(length)]
    return [
        Panel(
            f"{layers} layer{'s' if layers > 1 else ''}: {layers * (window - 1)} tokens back",
            positions,
            positions,
            coloured(dependence(layers, window, length), ["a"] * length),
        )
        for layers in (1, 2, 3)
    ]


FIGURES = {
    "attention-window": window_panels,
    "attention-masks": mask_panels,
    "rolling-cache": rolling_panels,
    "chunked-prefill": chunk_panels,
    "reach": reach_panels,
}


def cell(x: int, y: int, fill: str, text: str) -> str:
    box = f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" class="{fill or "empty"}"/>'
    place = f'x="{x + CELL // 2}" y="{y + CELL - 5}"'
    return box + (f'<text {place} class="in">{escape(text)}</text>' if text else "")


def panel_svg(panel: Panel, left: int) -> list[str]:
    parts = [f'<text x="{left}" y="16" class="title">{escape(panel.title)}</text>']
    for c, name in enumerate(panel.columns):
        parts.append(f'<text x="{left + c * CELL + CELL // 2}" y="{TOP - 6}" class="name">{escape(name)}</text>')
    for r, name in enumerate(panel.rows):
        y = TOP + r * CELL
        parts.append(f'<text x="{left - 6}" y="{y + CELL - 5}" class="row">{escape(name)}</text>')
        for c, fill in enumerate(panel.fills[r]):
            parts.append(cell(left + c * CELL, y, fill, panel.texts[r][c] if panel.texts else ""))
    return parts


def svg(panels: list[Panel]) -> str:
    parts, left = [], LEFT
    for panel in panels:
        parts += panel_svg(panel, left)
        left += max(len(panel.columns) * CELL, 7 * len(panel.title)) + GAP
    height = TOP + max(len(panel.rows) for panel in panels) * CELL + 12
    style = "text{font:11px sans-serif;fill:#222}.title{font-weight:bold}.row{text-anchor:end}"
    style += ".name,.in{text-anchor:middle}.name{font-size:10px}.in{font-size:10px;fill:#fff}.empty{fill:none}"
    style += ".stale+.in{fill:#888}rect{stroke:#9995}"
    style += "".join(f".{name}{{fill:{color}}}" for name, color in COLORS.items())
    style += "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left} {height}" width="{left}" height="{height}">'
    return "\n".join([head, f"<style>{style}</style>", *parts, "</svg>", ""])


def main(folder: Path) -> None:
    for name, panels in FIGURES.items():
        (folder / f"{name}.svg").write_text(svg(panels()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures")
