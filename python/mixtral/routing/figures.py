"""The figures of the report, as SVG for a page that may be light or dark."""

import io
import re
from itertools import count

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .coloured import shown_layers

WIDTH = 4.6  # inches; small, so that letters stay readable on a telephone
COLOURS = ("#3b82c4", "#e0733d", "#2f9e6e", "#b25bc2", "#c9a227", "#d6456b", "#5b6ee1", "#7a8b2f", "#8f6b52", "#17a2b8")
INK, FAINT = "#010203", "#040506"  # stand for the page's colours
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mixtral",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
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
_number = count()


def all_figures(metrics: dict) -> list[tuple[str, str, str]]:
    """(title, caption, SVG) of every group that was measured."""
    with mpl.rc_context(_STYLE):
        drawn = [(title, caption, draw(metrics)) for group, title, caption, draw in _FIGURES if _has(metrics, group)]
        return [(title, caption, _svg(figure)) for title, caption, figure in drawn]


def _has(metrics: dict, group: str) -> bool:
    return any(group in layer for layer in metrics["layers"])


def _svg(figure: Figure) -> str:
    """Without a size of its own, in the page's colours, with ids that no other figure has."""
    with mpl.rc_context(_STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    mark = f"f{next(_number)}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\1{mark}", svg)


def _axes(rows: int = 1, columns: int = 1, height: float = 2.1, share: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share)
    return figure, list(grid.flat)


def _numbers(metrics: dict) -> list[int]:
    return [layer["layer"] for layer in metrics["layers"]]


def _values(items: list[float | None]) -> np.ndarray:
    return np.array([np.nan if item is None else item for item in items], float)


def _line(axes: Axes, metrics: dict, found: list[dict | float | None], label: str, style: str = "-", **more) -> None:
    """Over the layers; an object with low and high gets a band."""
    numbers = _numbers(metrics)
    plain = _values([item["value"] if isinstance(item, dict) else item for item in found])
    marker = "o" if len(numbers) <= 8 else None
    (line,) = axes.plot(numbers, plain, style, label=label, marker=marker, **more)
    if all(isinstance(item, dict) and item.get("low") is not None for item in found):
        low, high = (_values([item[end] for item in found]) for end in ("low", "high"))
        axes.fill_between(numbers, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))


def _shown(metrics: dict, group: str) -> list[dict]:
    layers = [layer for layer in metrics["layers"] if group in layer]
    numbers = shown_layers([layer["layer"] for layer in layers])
    return [layer for layer in layers if layer["layer"] in numbers]


def _load(metrics: dict) -> Figure:
    layers = _shown(metrics, "load")
    figure, grid = _axes(len(layers), height=1.5)
    for axes, layer in zip(grid, layers, strict=True):
        domains = layer["load"]
        width = 0.8 / len(domains)
        for index, (name, load) in enumerate(domains.items()):
            at = np.arange(len(load["either"])) + (index - (len(domains) - 1) / 2) * width
            half = _values(load["half_width"]["either"])
            axes.bar(at, load["either"], width, yerr=half, error_kw={"linewidth": 0.6, "ecolor": INK}, label=name)
        axes.axhline(1 / metrics["experts"], color=INK, linewidth=0.8, linestyle="--")
        axes.set_title(f"layer {layer['layer']}")
        _percent(axes)
    grid[-1].set_xlabel("expert")
    _legend(figure, grid[0])
    return figure


def _balance(metrics: dict) -> Figure:
    figure, grid = _axes(1, 2)
    for axes, (name, title) in zip(grid, [("max_violation", "MaxVio"), ("entropy", "H / log E")], strict=True):
        for domain in metrics["layers"][0]["load"]:
            _line(axes, metrics, [layer["load"][domain][name] for layer in metrics["layers"]], domain)
        axes.set_title(title)
    _legend(figure, grid[0])
    return figure


def _locality(metrics: dict) -> Figure:
    figure, grid = _axes(2, height=2.3)
    for axes, name in zip(grid, ("first", "either"), strict=True):
        for index, domain in enumerate(metrics["layers"][0]["locality"]):
            found = [layer["locality"][domain] for layer in metrics["layers"]]
            colour = COLOURS[index % len(COLOURS)]
            _line(axes, metrics, [item["intervals"][name] for item in found], domain, color=colour)
            nulls = [item[f"null_{name}"] for item in found]
            _line(axes, metrics, nulls, f"{domain}, by load", ":", color=colour)
        axes.axhline(found[0][f"uniform_{name}"], color=INK, linewidth=0.8, linestyle="--", label="uniform")
        axes.set_title({"first": "same first choice", "either": "an expert in common"}[name])
        _percent(axes)
    _legend(figure, grid[0], 2)
    return figure


def _lags(metrics: dict) -> Figure:
    figure, grid = _axes(1, 2)
    for axes, name in zip(grid, ("first", "either"), strict=True):
        for layer in _shown(metrics, "locality"):
            lags = [int(lag) for lag in next(iter(layer["locality"].values()))["lags"]]
            excess = [np.mean([_excess(found, str(lag), name) for found in layer["locality"].values()]) for lag in lags]
            axes.plot(lags, excess, marker="o", label=f"layer {layer['layer']}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("lag")
        axes.axhline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set_title({"first": "first choice", "either": "either"}[name])
        _percent(axes)
    _legend(figure, grid[0])
    return figure


def _excess(found: dict, lag: str, name: str) -> float:
    value = found["lags"][lag][name]
    return np.nan if value is None else value - found[f"null_{name}"]


_CAUSES = {
    "token": "token",
    "predicted": "predicted token",
    "domain": "domain",
    "domain_given_token": "domain, given the token",
    "previous_given_token": "previous expert, given the token",
    "position": "position",
}


def _information(metrics: dict) -> Figure:
    figure, (axes,) = _axes(height=2.8)
    for name, label in _CAUSES.items():
        if name in metrics["layers"][0]["information"]:
            _line(axes, metrics, [layer["information"][name] for layer in metrics["layers"]], label)
    axes.set_ylabel("bits")
    _legend(figure, axes, 2)
    return figure


def _vocabulary(metrics: dict) -> Figure:
    figure, (axes,) = _axes(height=2.4)
    labels = {"input": "token read", "predicted": "token predicted", "true": "token that follows"}
    for index, (name, label) in enumerate(labels.items()):
        found = [layer["vocabulary"][name] for layer in metrics["layers"]]
        _line(axes, metrics, [item["specialisation"] for item in found], label, color=COLOURS[index])
        _line(axes, metrics, [item["null"] for item in found], f"{label}, null", ":", color=COLOURS[index])
    _percent(axes)
    _legend(figure, axes, 2)
    return figure


def _matrices(metrics: dict, group: str, name: str, colours: str, least: float, most: float) -> Figure:
    layers = _shown(metrics, group)
    figure, grid = _axes(1, len(layers), height=2.0)
    for axes, layer in zip(grid, layers, strict=True):
        cells = np.array([_values(row) for row in layer[group][name]])
        image = axes.imshow(cells, cmap=colours, vmin=least, vmax=most)
        axes.grid(False)
        axes.set_title(f"layer {layer['layer']}")
    figure.colorbar(image, ax=grid, shrink=0.7)
    return figure


def _transition(metrics: dict) -> Figure:
    most = max(
        max(_values(row).max() for row in layer["transition"]["share"]) for layer in _shown(metrics, "transition")
    )
    return _matrices(metrics, "transition", "share", "viridis", 0, most)


def _cross_layer(metrics: dict) -> Figure:
    figure, (axes,) = _axes()
    _line(axes, metrics, [layer.get("transition", {}).get("normalised") for layer in metrics["layers"]], "NMI")
    axes.set_ylim(bottom=0)
    return figure


def _languages(metrics: dict) -> Figure:
    figure, (axes,) = _axes(height=2.6)
    for index, pair in enumerate(metrics["layers"][0]["languages"]["divergence"]):
        found = [layer["languages"]["divergence"][pair] for layer in metrics["layers"]]
        colour = COLOURS[index % len(COLOURS)]
        _line(axes, metrics, found, pair, color=colour)
        _line(axes, metrics, [item["null"] for item in found], f"{pair}, null", ":", color=colour)
    _legend(figure, axes, 2)
    return figure


def _language_experts(metrics: dict) -> Figure:
    layers = _shown(metrics, "languages")
    figure, grid = _axes(len(layers), height=1.2)
    for axes, layer in zip(grid, layers, strict=True):
        experts = layer["languages"]["experts"]
        image = axes.imshow(np.array(list(experts.values())), cmap="viridis", vmin=0, aspect="auto")
        axes.set_yticks(range(len(experts)), list(experts))
        axes.grid(False)
        axes.set_title(f"layer {layer['layer']}")
        figure.colorbar(image, ax=axes)
    grid[-1].set_xlabel("expert")
    return figure


def _confidence(metrics: dict) -> Figure:
    figure, grid = _axes(1, 2)
    titles = {"entropy": "entropy / log E", "within_bfloat16": "undecided in bfloat16"}
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        for domain in metrics["layers"][0]["confidence"]:
            _line(axes, metrics, [layer["confidence"][domain][name] for layer in metrics["layers"]], domain)
        axes.set_title(title)
    _percent(grid[1])
    _legend(figure, grid[0])
    return figure


def _caching(metrics: dict) -> Figure:
    figure, (axes,) = _axes(height=2.4)
    names = {"belady": "Belady, the best", "lru": "LRU", "lfu": "LFU", "null": "random"}
    for name, label in names.items():
        rates = np.mean([layer["caching"][name] for layer in metrics["layers"]], axis=0)
        style = ":" if name == "null" else "-"
        axes.plot(metrics["layers"][0]["caching"]["capacity"], rates, style, marker="o", label=label)
    axes.set_xlabel("experts in the cache of a layer")
    _percent(axes)
    _legend(figure, axes, 4)
    return figure


def _capacity(metrics: dict) -> Figure:
    figure, (axes,) = _axes(height=2.2)
    for factor in metrics["layers"][0]["capacity"]:
        tenths = np.mean([layer["capacity"][factor]["by_position"] for layer in metrics["layers"]], axis=0)
        axes.plot(np.arange(len(tenths)) * 10 + 5, tenths, marker="o", label=f"capacity factor {factor}")
    axes.set_xlabel("place in the batch, %")
    _percent(axes)
    _legend(figure, axes)
    return figure


def _parallel(metrics: dict) -> Figure:
    figure, (axes,) = _axes()
    for index, ranks in enumerate(metrics["layers"][0]["expert_parallel"]):
        found = [layer["expert_parallel"][ranks] for layer in metrics["layers"]]
        colour = COLOURS[index]
        _line(axes, metrics, [item["max_over_mean"] for item in found], f"{ranks} ranks", color=colour)
        _line(axes, metrics, [item["null"] for item in found], f"{ranks} ranks, mixed", ":", color=colour)
    _legend(figure, axes, 2)
    return figure


def _knockout(metrics: dict) -> Figure:
    layers = [layer for layer in metrics["layers"] if "knockout" in layer]
    figure, grid = _axes(1, 2, height=2.3)
    image = grid[0].imshow(np.array([layer["knockout"]["delta"] for layer in layers]), cmap="magma", aspect="auto")
    grid[0].set_yticks(range(len(layers)), [layer["layer"] for layer in layers])
    grid[0].set(xlabel="expert", ylabel="layer", title="rise of NLL, nats")
    grid[0].grid(False)
    figure.colorbar(image, ax=grid[0])
    experts = metrics["experts_per_token"]
    grid[1].plot(experts["k"], experts["nll"], marker="o")
    grid[1].set(xlabel="experts per token", title="NLL, nats")
    return figure


def _saturation(metrics: dict) -> Figure:
    figure, (axes,) = _axes()
    found = [layer["saturation"] for layer in metrics["layers"]]
    _line(axes, metrics, found, "same experts")
    _line(axes, metrics, [item["null"] for item in found], "by load", ":")
    _percent(axes)
    _legend(figure, axes)
    return figure


# Group, title, caption, function.
_FIGURES = (
    (
        "load",
        "Load",
        "Share of assignments that each expert gets, with 99 % intervals; dashed: even loads. As Fig. 7 of the paper.",
        _load,
    ),
    ("load", "Balance", "MaxVio is the largest load over the mean, less 1. An entropy of 1 is even.", _balance),
    (
        "locality",
        "Locality",
        "How often neighbouring tokens share experts. Dotted: independent tokens with the measured loads; dashed: with"
        " even loads, the baseline of Fig. 10 of the paper.",
        _locality,
    ),
    ("locality", "Locality over distance", "The same further apart, above the dotted line; mean of domains.", _lags),
    (
        "information",
        "What decides",
        "How many bits of a token's expert its causes tell, corrected for what permuted labels show.",
        _information,
    ),
    (
        "vocabulary",
        "Vocabulary",
        "The largest share of one expert among the occurrences of a token. Dotted: after a permutation.",
        _vocabulary,
    ),
    (
        "coactivation",
        "Chosen together",
        "How often two experts serve the same token, over what their loads make of it (1: independent).",
        lambda metrics: _matrices(metrics, "coactivation", "lift", "RdBu_r", 0, 2),
    ),
    (
        "transition",
        "From layer to layer",
        "Share of the next layer's first choices (columns) for each first choice of this one (rows).",
        _transition,
    ),
    ("transition", "Information between layers", "I(e; e') as a part of the entropies, less its bias.", _cross_layer),
    (
        "languages",
        "Languages",
        "Divergence of the experts of parallel texts, 0 to 1. Dotted: between halves of one language.",
        _languages,
    ),
    ("languages", "Experts of languages", "Share of assignments.", _language_experts),
    (
        "confidence",
        "Confidence",
        "Of the router's softmax; how many choices the rounding of two logits could change.",
        _confidence,
    ),
    ("caching", "Caching", "Hit rate when a layer keeps some experts in fast memory; mean of layers.", _caching),
    (
        "expert_parallel",
        "Expert parallelism",
        "The largest load of a rank over the mean, batches of 512 tokens. Dotted: the same tokens mixed.",
        _parallel,
    ),
    (
        "capacity",
        "Capacity",
        "What a limit would drop, by place in a batch of 512 tokens; Mixtral has none.",
        _capacity,
    ),
    (
        "knockout",
        "Knock-out",
        "Without the output of one expert; and with other numbers of experts per token.",
        _knockout,
    ),
    (
        "saturation",
        "Saturation",
        "Share of experts that both checkpoints choose. Dotted: independent choices.",
        _saturation,
    ),
)
