"""``metrics.json`` as tables of pandas."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import pandas as pd

from ..errors import LoadError

_EXPERT_LISTS = ("first", "second", "either")
Rows = Callable[[list[dict]], list[dict]]  # of a table, from the layers


def load(folder: str | PathLike[str]) -> dict[str, pd.DataFrame]:
    """The tables of a folder that ``mixtral route`` wrote; those whose group was measured.

    Every table has the column ``layer``, the number in the model. Shares are in [0, 1], information in bits.

    Returns:
        ``load`` (layer, domain, expert, first, second, either), ``balance`` (layer, domain, entropy, jain, ...),
        ``locality`` (layer, domain, first, either, null_first, ...), ``information`` (layer, cause, value, low, high,
        ...), and so on: docs/routing.md lists them.

    Raises:
        LoadError: the folder has no ``metrics.json``, or another file of that name.
    """
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        layers = metrics["layers"]
    except OSError as error:
        reason = f"{error.strerror}: expected a folder that mixtral route wrote"
        raise LoadError(f"{path}: {reason}", str(path), "", reason) from None
    except (ValueError, TypeError, KeyError):
        reason = "no metrics of mixtral route"
        raise LoadError(f"{path}: {reason}", str(path), "", reason) from None
    tables = {name: pd.DataFrame(rows(layers)) for name, rows in _TABLES.items()}
    return {name: table for name, table in tables.items() if len(table)}


def _load(layers: list[dict]) -> list[dict]:
    return [
        {"layer": layer["layer"], "domain": domain, "expert": expert}
        | {name: (found[name] or [None] * len(found["either"]))[expert] for name in _EXPERT_LISTS}
        for layer in layers
        for domain, found in layer["load"].items()
        for expert in range(len(found["either"]))
    ]


def _by_domain(group: str) -> Rows:
    """One row a layer and domain: the numbers of the group."""
    return lambda layers: [
        {"layer": layer["layer"], "domain": domain} | _numbers(found)
        for layer in layers
        for domain, found in layer.get(group, {}).items()
    ]


def _keyed(group: str, column: str, inner: str | None = None) -> Rows:
    """One row a layer and key of the group, or of the group's object ``inner``."""

    def rows(layers: list[dict]) -> list[dict]:
        return [
            {"layer": layer["layer"], column: key} | _numbers(found)
            for layer in layers
            for key, found in (layer.get(group, {}).get(inner, {}) if inner else layer.get(group, {})).items()
            if isinstance(found, dict)
        ]

    return rows


def _matrix(group: str, names: tuple[str, ...], columns: tuple[str, str]) -> Rows:
    """One row for each cell of the group's matrices."""
    return lambda layers: [
        {"layer": layer["layer"], columns[0]: i, columns[1]: j} | {name: layer[group][name][i][j] for name in names}
        for layer in layers
        if group in layer
        for i in range(len(layer[group][names[0]]))
        for j in range(len(layer[group][names[0]]))
    ]


def _lists(group: str, names: tuple[str, ...]) -> Rows:
    """One row for each place of the group's lists, which are equally long."""
    return lambda layers: [
        {"layer": layer["layer"]} | dict(zip(names, values, strict=True))
        for layer in layers
        if group in layer
        for values in zip(*(layer[group][name] for name in names), strict=True)
    ]


def _single(group: str) -> Rows:
    """One row a layer: the numbers of the group."""
    return lambda layers: [{"layer": layer["layer"]} | _numbers(layer[group]) for layer in layers if group in layer]


def _numbers(found: dict) -> dict:
    return {name: value for name, value in found.items() if not isinstance(value, dict | list)}


def _lags(layers: list[dict]) -> list[dict]:
    return [
        {"layer": layer["layer"], "domain": domain, "lag": int(lag)} | both
        for layer in layers
        for domain, found in layer.get("locality", {}).items()
        for lag, both in found["lags"].items()
    ]


def _knockout(layers: list[dict]) -> list[dict]:
    return [
        {"layer": layer["layer"], "expert": expert} | dict(zip(found, values, strict=True))
        for layer in layers
        if (found := layer.get("knockout"))
        for expert, values in enumerate(zip(*found.values(), strict=True))
    ]


_TABLES = {
    "load": _load,
    "balance": lambda layers: [
        {name: value for name, value in row.items() if name not in _EXPERT_LISTS} for row in _by_domain("load")(layers)
    ],
    "locality": _by_domain("locality"),
    "lags": _lags,
    "information": _keyed("information", "cause"),
    "vocabulary": lambda layers: [row for row in _keyed("vocabulary", "label")(layers) if "specialisation" in row],
    "coactivation": _matrix("coactivation", ("share", "lift"), ("expert", "other")),
    "transition": _matrix("transition", ("share",), ("expert", "next")),
    "cross_layer": _single("transition"),
    "gate_recall": _single("gate_recall"),
    "languages": _keyed("languages", "pair", "divergence"),
    "confidence": _by_domain("confidence"),
    "caching": _lists("caching", ("capacity", "lru", "lfu", "belady", "null")),
    "expert_parallel": _keyed("expert_parallel", "ranks"),
    "capacity": _keyed("capacity", "factor"),
    "saturation": _single("saturation"),
    "knockout": _knockout,
}
