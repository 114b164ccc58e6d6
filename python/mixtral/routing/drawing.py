"""How the figures of the report are drawn: one style, axes, lines over the layers, and SVG for any page."""

import io
import re

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .coloured import shown_layers

WIDTH = 4.6  # inches; small, so that letters stay readable on a telephone
COLOURS = ("#3b82c4", "#e0733d", "#2f9e6e", "#b25bc2", "#c9a227", "#d6456b", "#5b6ee1", "#7a8b2f", "#8f6b52", "#17a2b8")
INK, FAINT = "#010203", "#040506"  # stand for the page's colours
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mixtral",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def to_svg(figure: Figure, mark: str) -> str:
    """Without a size of its own and in the page's colours; ids begin with ``mark``, to differ from other figures'."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return re.sub(r'(id="|url\(#|href="#)', rf"\1{mark}", svg)


def axes_grid(rows: int = 1, columns: int = 1, height: float = 2.1) -> tuple[Figure, list[Axes]]:
    """A figure of rows that are ``height`` inches high."""
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def values(items: list[float | None]) -> np.ndarray:
    """NaN, which is not drawn, for null."""
    return np.array([np.nan if item is None else item for item in items], float)


def line(axes: Axes, metrics: dict, found: list[dict | float | None], label: str, style: str = "-", **more) -> None:
    """Over the layers; an object with low and high gets a band."""
    numbers = [layer["layer"] for layer in metrics["layers"]]
    plain = values([item["value"] if isinstance(item, dict) else item for item in found])
    marker = "o" if len(numbers) <= 8 else None
    (drawn,) = axes.plot(numbers, plain, style, label=label, marker=marker, **more)
    if all(isinstance(item, dict) and item.get("low") is not None for item in found):
        low, high = (values([item[end] for item in found]) for end in ("low", "high"))
        axes.fill_between(numbers, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))


def shown(metrics: dict, group: str) -> list[dict]:
    """First, middle and last of the layers with this group."""
    layers = [layer for layer in metrics["layers"] if group in layer]
    numbers = shown_layers([layer["layer"] for layer in layers])
    return [layer for layer in layers if layer["layer"] in numbers]
