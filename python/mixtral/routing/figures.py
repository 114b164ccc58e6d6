"""The figures of the report, one function each: metrics -> figure."""

import numpy as np
from matplotlib.figure import Figure

from .drawing import COLOURS, INK, axes_grid, legend, line, percent, shown, values


def load(metrics: dict) -> Figure:
    layers = shown(metrics, "load")
    figure, grid = axes_grid(len(layers), height=1.5)
    for axes, layer in zip(grid, layers, strict=True):
        domains = layer["load"]
        width = 0.8 / len(domains)
        for index, (name, load) in enumerate(domains.items()):
            at = np.arange(len(load["either"])) + (index - (len(domains) - 1) / 2) * width
            half = values(load["half_width"]["either"])
            axes.bar(at, load["either"], width, yerr=half, error_kw={"linewidth": 0.6, "ecolor": INK}, label=name)
        axes.axhline(1 / metrics["experts"], color=INK, linewidth=0.8, linestyle="--")
        axes.set_title(f"layer {layer['layer']}")
        percent(axes)
    grid[-1].set_xlabel("expert")
    legend(figure, grid[0])
    return figure


def balance(metrics: dict) -> Figure:
    figure, grid = axes_grid(1, 2)
    for axes, (name, title) in zip(grid, [("max_violation", "MaxVio"), ("entropy", "H / log E")], strict=True):
        for domain in metrics["layers"][0]["load"]:
            line(axes, metrics, [layer["load"][domain][name] for layer in metrics["layers"]], domain)
        axes.set_title(title)
    legend(figure, grid[0])
    return figure


def locality(metrics: dict) -> Figure:
    figure, grid = axes_grid(2, height=2.3)
    for axes, name in zip(grid, ("first", "either"), strict=True):
        for index, domain in enumerate(metrics["layers"][0]["locality"]):
            found = [layer["locality"][domain] for layer in metrics["layers"]]
            colour = COLOURS[index % len(COLOURS)]
            line(axes, metrics, [item["intervals"][name] for item in found], domain, color=colour)
            nulls = [item[f"null_{name}"] for item in found]
            line(axes, metrics, nulls, f"{domain}, by load", ":", color=colour)
        axes.axhline(found[0][f"uniform_{name}"], color=INK, linewidth=0.8, linestyle="--", label="uniform")
        axes.set_title({"first": "same first choice", "either": "an expert in common"}[name])
        percent(axes)
    legend(figure, grid[0], 2)
    return figure


def lags(metrics: dict) -> Figure:
    figure, grid = axes_grid(1, 2)
    for axes, name in zip(grid, ("first", "either"), strict=True):
        for layer in shown(metrics, "locality"):
            lags = [int(lag) for lag in next(iter(layer["locality"].values()))["lags"]]
            excess = [np.mean([_excess(found, str(lag), name) for found in layer["locality"].values()]) for lag in lags]
            axes.plot(lags, excess, marker="o", label=f"layer {layer['layer']}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("lag")
        axes.axhline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set_title({"first": "first choice", "either": "either"}[name])
        percent(axes)
    legend(figure, grid[0])
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


def information(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid(height=2.8)
    for name, label in _CAUSES.items():
        if name in metrics["layers"][0]["information"]:
            line(axes, metrics, [layer["information"][name] for layer in metrics["layers"]], label)
    axes.set_ylabel("bits")
    legend(figure, axes, 2)
    return figure


def vocabulary(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid(height=2.4)
    labels = {"input": "token read", "predicted": "token predicted", "true": "token that follows"}
    for index, (name, label) in enumerate(labels.items()):
        found = [layer["vocabulary"][name] for layer in metrics["layers"]]
        line(axes, metrics, [item["specialisation"] for item in found], label, color=COLOURS[index])
        line(axes, metrics, [item["null"] for item in found], f"{label}, null", ":", color=COLOURS[index])
    percent(axes)
    legend(figure, axes, 2)
    return figure


def matrices(metrics: dict, group: str, name: str, colours: str, least: float, most: float) -> Figure:
    layers = shown(metrics, group)
    figure, grid = axes_grid(1, len(layers), height=2.0)
    for axes, layer in zip(grid, layers, strict=True):
        cells = np.array([values(row) for row in layer[group][name]])
        image = axes.imshow(cells, cmap=colours, vmin=least, vmax=most)
        axes.grid(False)
        axes.set_title(f"layer {layer['layer']}")
    figure.colorbar(image, ax=grid, shrink=0.7)
    return figure


def transition(metrics: dict) -> Figure:
    most = max(max(values(row).max() for row in layer["transition"]["share"]) for layer in shown(metrics, "transition"))
    return matrices(metrics, "transition", "share", "viridis", 0, most)


def cross_layer(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid()
    line(axes, metrics, [layer.get("transition", {}).get("normalised") for layer in metrics["layers"]], "NMI")
    axes.set_ylim(bottom=0)
    return figure


def languages(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid(height=2.6)
    for index, pair in enumerate(metrics["layers"][0]["languages"]["divergence"]):
        found = [layer["languages"]["divergence"][pair] for layer in metrics["layers"]]
        colour = COLOURS[index % len(COLOURS)]
        line(axes, metrics, found, pair, color=colour)
        line(axes, metrics, [item["null"] for item in found], f"{pair}, null", ":", color=colour)
    legend(figure, axes, 2)
    return figure


def language_experts(metrics: dict) -> Figure:
    layers = shown(metrics, "languages")
    figure, grid = axes_grid(len(layers), height=1.2)
    for axes, layer in zip(grid, layers, strict=True):
        experts = layer["languages"]["experts"]
        image = axes.imshow(np.array(list(experts.values())), cmap="viridis", vmin=0, aspect="auto")
        axes.set_yticks(range(len(experts)), list(experts))
        axes.grid(False)
        axes.set_title(f"layer {layer['layer']}")
        figure.colorbar(image, ax=axes)
    grid[-1].set_xlabel("expert")
    return figure


def confidence(metrics: dict) -> Figure:
    figure, grid = axes_grid(1, 2)
    titles = {"entropy": "entropy / log E", "within_bfloat16": "undecided in bfloat16"}
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        for domain in metrics["layers"][0]["confidence"]:
            line(axes, metrics, [layer["confidence"][domain][name] for layer in metrics["layers"]], domain)
        axes.set_title(title)
    percent(grid[1])
    legend(figure, grid[0])
    return figure


def caching(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid(height=2.4)
    names = {"belady": "Belady, the best", "lru": "LRU", "lfu": "LFU", "null": "random"}
    for name, label in names.items():
        rates = np.mean([layer["caching"][name] for layer in metrics["layers"]], axis=0)
        style = ":" if name == "null" else "-"
        axes.plot(metrics["layers"][0]["caching"]["capacity"], rates, style, marker="o", label=label)
    axes.set_xlabel("experts in the cache of a layer")
    percent(axes)
    legend(figure, axes, 4)
    return figure


def capacity(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid(height=2.2)
    for factor in metrics["layers"][0]["capacity"]:
        tenths = np.mean([layer["capacity"][factor]["by_position"] for layer in metrics["layers"]], axis=0)
        axes.plot(np.arange(len(tenths)) * 10 + 5, tenths, marker="o", label=f"capacity factor {factor}")
    axes.set_xlabel("place in the batch, %")
    percent(axes)
    legend(figure, axes)
    return figure


def parallel(metrics: dict) -> Figure:
    figure, (axes,) = axes_grid()
    for index, ranks in enumerate(metrics["layers"][0]["expert_parallel"]):
        found = [layer["expert_parallel"][ranks] for layer in metrics["layers"]]
        colour = COLOURS[index]
        line(axes, metrics, [item["max_over_mean"] for item in found], f"{ranks} ranks", color=colour)
        line(axes, metrics, [item["null"] for item in found], f"{ranks} ranks, mixed", ":", color=colour)
    legend(figure, axes, 2)
    return figure


def knockout(metrics: dict) -> Figure:
    layers = [layer for layer in metrics["layers"] if "knockout" in layer]
    figure, grid = axes_grid(1, 2, height=2.3)
    image = grid[0].imshow(np.array([layer["knockout"]["delta"] for layer in layers]), cmap="magma", aspect="auto")
    grid[0].set_yticks(range(len(layers)), [layer["layer"] for layer in layers])
    grid[0].set(xlabel="expert", ylabel="layer", title="rise of NLL, nats")
    grid[0].grid(False)
    figure.colorbar(image, ax=grid[0])
    experts = metrics["experts_per_token"]
    grid[1].plot(experts["k"], experts["nll"], marker="o")
    grid[1].set(xlabel="experts per token", title="NLL, nats")
    return figure


def gate_recall(metrics: dict) -> Figure:
    return _overlap(metrics, "gate_recall", "found")


def saturation(metrics: dict) -> Figure:
    return _overlap(metrics, "saturation", "same experts")


def _overlap(metrics: dict, group: str, label: str) -> Figure:
    figure, (axes,) = axes_grid()
    found = [layer.get(group) for layer in metrics["layers"]]
    line(axes, metrics, found, label)
    line(axes, metrics, [item and item["null"] for item in found], "by load", ":")
    percent(axes)
    legend(figure, axes)
    return figure
