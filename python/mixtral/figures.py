"""Figures of the results of ``mixtral.long_context`` and of the binary's ``--json``, as SVG. Needs matplotlib.

python -m mixtral.figures passkey passkey.svg < result.json
"""

import json
import sys
from collections.abc import Callable
from os import PathLike
from pathlib import Path

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("mixtral.figures needs matplotlib: pip install 'mixtral[routing]'") from error

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8641e", "#777777"
# The same bits from the same data: no random ids, no date.
_STYLE = {"svg.hashsalt": "mixtral", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False}
_STYLE["axes.spines.right"] = False


def draw(kind: str, result: dict, path: str | PathLike[str]) -> None:
    """Draw a result into an SVG file.

    Args:
        kind: "perplexity", "passkey" or "reach": the function of ``mixtral.long_context``, or the binary's command.
        result: what it gave.

    Raises:
        ValueError: another kind.
        OSError: the file cannot be written.
    """
    if kind not in _FIGURES:
        raise ValueError(f"figures: kind must be one of {', '.join(_FIGURES)}, got {kind}")
    with rc_context(_STYLE):
        figure = _FIGURES[kind](result)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _perplexity(result: dict) -> Figure:
    """Bits per byte by context, with one standard error; nats per token where bytes are unknown."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    rows = result["contexts"]
    contexts = [row["context"] for row in rows]
    name = "nll" if any(row["bits_per_byte"] is None for row in rows) else "bits_per_byte"
    values = [row[name] for row in rows]
    errors = [row["standard_error"] * row[name] / row["nll"] for row in rows]
    axes.errorbar(contexts, values, yerr=errors, marker="o", color=_BLUE, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("bits per byte" if name == "bits_per_byte" else "nats per token")
    axes.set_title(f"loss by context, protocol {result['protocol']}")
    _lines_of_the_window(axes, result, (contexts[0], contexts[-1]))
    return figure


def _passkey(result: dict) -> Figure:
    """The share found: by length and depth, and by distance."""
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    grid, curve = figure.subplots(1, 2)
    cells = result["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    share = {(cell["length"], cell["depth"]): cell["correct"] / cell["trials"] for cell in cells}
    table = [[share[length, depth] for length in lengths] for depth in depths]
    image = grid.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=grid, label="share found")
    grid.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    grid.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    grid.set_xlabel("length of the prompt, tokens")
    grid.set_ylabel("depth of the key")

    cells = sorted(result["distances"] or cells, key=lambda cell: cell["distance"])
    distances = [cell["distance"] for cell in cells]
    shares = [cell["correct"] / cell["trials"] for cell in cells]
    below = [max(0.0, value - cell["low"]) for value, cell in zip(shares, cells, strict=True)]
    above = [max(0.0, cell["high"] - value) for value, cell in zip(shares, cells, strict=True)]
    curve.errorbar(distances, shares, yerr=[below, above], marker="o", color=_BLUE, linewidth=1, capsize=2)
    curve.axhline(result["chance"], color=_GREY, linestyle=":", label="chance")
    curve.set_ylim(-0.02, 1.02)
    curve.set_xlabel("distance of the key, tokens")
    curve.set_ylabel("share found, 95 % intervals")
    _lines_of_the_window(curve, result, (distances[0], distances[-1]))
    figure.suptitle(f"passkey, {result['style']}, {result['digits']} digits, k_max {result['k_max']}")
    return figure


def _reach(result: dict) -> Figure:
    """The share of outputs that change, by distance from the replaced token."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    changed = sorted((int(distance), share) for distance, share in result["changed"].items())
    distances, shares = zip(*changed, strict=True)
    axes.fill_between(distances, shares, step="mid", color=_BLUE, alpha=0.75, linewidth=0)
    axes.set_ylim(0, 1.05)
    axes.set_xlim(0, max(distances))
    axes.set_xlabel("tokens behind the replaced one")
    axes.set_ylabel("share of outputs that change")
    axes.set_title("receptive field" + (f": {result['reach']} tokens" if result["reach"] is not None else ""))
    _lines_of_the_window(axes, result, (0, max(distances)))
    return figure


def _lines_of_the_window(axes: Axes, result: dict, visible: tuple[float, float]) -> None:
    """Vertical lines at W and at L * (W - 1), where they are in sight."""
    if result["reach"] is not None:
        for at, name, color in [
            (result["window"], "window W", _ORANGE),
            (result["reach"], "reach L\u00b7(W\u22121)", _GREY),
        ]:
            if visible[0] <= at <= visible[1]:
                axes.axvline(at, color=color, linestyle="--", label=f"{name} = {at}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


_FIGURES: dict[str, Callable[[dict], Figure]] = {"perplexity": _perplexity, "passkey": _passkey, "reach": _reach}


if __name__ == "__main__":
    draw(sys.argv[1], json.load(sys.stdin), Path(sys.argv[2]))
