"""Which figures the report shows, and what it says below them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from . import figures
from .drawing import STYLE, to_svg


class Entry(NamedTuple):
    """A figure of the report."""

    group: str  # of metrics.json, without which there is no figure
    title: str
    caption: str
    draw: Callable[[dict], Figure]


def _lift(metrics: dict) -> Figure:
    return figures.matrices(metrics, "coactivation", "lift", "RdBu_r", 0, 2)


ENTRIES = (
    Entry(
        "load",
        "Load",
        "Share of assignments that each expert gets, with 99 % intervals; dashed: even loads. As Fig. 7 of the paper.",
        figures.load,
    ),
    Entry(
        "load",
        "Balance",
        "MaxVio is the largest load over the mean, less 1. An entropy of 1 is even.",
        figures.balance,
    ),
    Entry(
        "locality",
        "Locality",
        "How often neighbouring tokens share experts. Dotted: independent tokens with the measured loads; dashed: with "
        "even loads, the baseline of Fig. 10 of the paper.",
        figures.locality,
    ),
    Entry(
        "locality",
        "Locality over distance",
        "The same further apart, over what the loads alone make of it; mean of domains.",
        figures.lags,
    ),
    Entry(
        "information",
        "What decides",
        "How many bits of a token's expert its causes tell, corrected for what permuted labels show.",
        figures.information,
    ),
    Entry(
        "vocabulary",
        "Vocabulary",
        "The largest share of one expert among the occurrences of a token. Dotted: after a permutation.",
        figures.vocabulary,
    ),
    Entry(
        "coactivation",
        "Chosen together",
        "How often two experts serve the same token, over what their loads make of it. 1: independent.",
        _lift,
    ),
    Entry(
        "transition",
        "From layer to layer",
        "Share of the next layer's first choices (columns) for each first choice of this one (rows).",
        figures.transition,
    ),
    Entry(
        "transition",
        "Information between layers",
        "What the first choice tells of the next layer's, as a part of their entropies.",
        figures.cross_layer,
    ),
    Entry(
        "gate_recall",
        "The next router, one layer early",
        "Share of the next layer's experts that its router finds in this layer's input. Dotted: independent choices.",
        figures.gate_recall,
    ),
    Entry(
        "languages",
        "Languages",
        "Divergence of the experts of parallel texts, 0 to 1. Dotted: between halves of one language.",
        figures.languages,
    ),
    Entry(
        "languages",
        "Experts of languages",
        "Share of assignments.",
        figures.language_experts,
    ),
    Entry(
        "confidence",
        "Confidence",
        "Entropy of the router's softmax; share of choices that rounding two logits to bfloat16 could change.",
        figures.confidence,
    ),
    Entry(
        "caching",
        "Caching",
        "Hit rate when a layer keeps some of its experts in fast memory; mean of layers.",
        figures.caching,
    ),
    Entry(
        "expert_parallel",
        "Expert parallelism",
        "The largest load of a rank over the mean, in batches of 512 tokens. Dotted: the same tokens mixed.",
        figures.parallel,
    ),
    Entry(
        "capacity",
        "Capacity",
        "What a limit would drop, by place in a batch of 512 tokens; Mixtral has no limit. Mean of layers.",
        figures.capacity,
    ),
    Entry(
        "knockout",
        "Knock-out",
        "How much worse the model predicts without an expert, and with other numbers of experts per token.",
        figures.knockout,
    ),
    Entry(
        "saturation",
        "Saturation",
        "Share of experts that both checkpoints choose. Dotted: independent choices.",
        figures.saturation,
    ),
)


def drawn(metrics: dict) -> Iterator[tuple[str, str, str]]:
    """(title, caption, SVG) of every group that was measured."""
    for index, entry in enumerate(ENTRIES):
        if any(entry.group in layer for layer in metrics["layers"]):
            with mpl.rc_context(STYLE):
                yield entry.title, entry.caption, to_svg(entry.draw(metrics), f"f{index}-")
