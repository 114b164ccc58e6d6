"""Bare counts of assignments, such as allenai/OLMoE publishes: load, and what the domain decides."""

import json
from os import PathLike

import numpy as np
from scipy import stats

from ..errors import LoadError
from .analysis import VERSION, plain
from .expert_load import balance, multinomial_half_width, shares
from .statistics import CONFIDENCE, interval, mutual_information_bits

Counts = dict[str, np.ndarray]  # domain -> int [L, E]


def analyse_counts(path: str | PathLike[str], key: str = "", layers: list[int] | None = None) -> dict:
    """The metrics of ``{"topk_assignments": {domain: [[E counts], one a layer]}, "top1": {...}, "layers": [...]}``.

    Args:
        path: a JSON file.
        key: where in the file's object this is; "": it is the object. ``layers`` may also stand in the outer one.
        layers: those that are analysed, out of the numbers in ``layers``; None: all.

    Raises:
        LoadError: no such file, no JSON, or other counts than these.
        ValueError: an unknown key or layer.
    """
    root = _read(path)
    counts = _under(root, key, path)
    both = {name: _table(counts.get(name), name, path) for name in ("topk_assignments", "top1")}
    assigned, first = both["topk_assignments"], both["top1"]
    if assigned is None:
        raise _error(path, "topk_assignments", "missing")
    shape = next(iter(assigned.values())).shape
    if first is not None and {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in assigned.items()}:
        raise _error(path, "top1", "expected the domains and sizes of topk_assignments")
    numbers = counts.get("layers", root.get("layers", list(range(shape[0]))))
    if not _are_layers(numbers, shape[0]):
        raise _error(path, "layers", f"expected {shape[0]} different numbers, all >= 0")
    for layer in layers or []:
        if layer not in numbers:
            raise ValueError(f"--layers: expected layers out of {', '.join(map(str, numbers))}, got {layer}")

    sizes = {name: int((table if first is None else first[name])[0].sum()) for name, table in assigned.items()}
    top_k = _top_k(assigned, first, path)
    found = [
        _layer(number, index, assigned, first, top_k)
        for index, number in enumerate(numbers)
        if layers is None or number in layers
    ]
    head = {"version": VERSION, "source": f"{path}#{key}" if key else str(path), "experts": shape[1], "top_k": top_k}
    return plain(head | {"domains": sizes, "languages": [], "confidence": CONFIDENCE, "layers": found})


def _are_layers(numbers: object, count: int) -> bool:
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        return False
    return len(numbers) == len(set(numbers)) == count


def _layer(number: int, index: int, assigned: Counts, first: Counts | None, top_k: int | None) -> dict:
    load = {}
    for name, table in assigned.items():
        either, best = table[index], None if first is None else first[name][index]
        second = either - best if best is not None and top_k == 2 else None
        load[name] = shares(best, second, either) | balance(either)
        load[name]["half_width"] = {"either": multinomial_half_width(either)} | (
            {} if best is None else {"first": multinomial_half_width(best)}
        )
    information = {"domain": _information(assigned, index)}
    if first is not None:
        information["domain_first"] = _information(first, index)
    return {"layer": number, "load": load, "information": information}


def _information(tables: Counts, index: int) -> dict:
    """I(expert; domain), with the interval of independent assignments: the bias, some 1e-5 bits, is left in."""
    table = np.stack([rows[index] for rows in tables.values()]).astype(float)
    bits, total = mutual_information_bits(table), table.sum()
    expected = np.outer(table.sum(1), table.sum(0)) / total
    logs = np.log2(np.divide(table, expected, out=np.ones_like(table), where=table > 0))
    spread = np.sqrt(max((table * logs**2).sum() / total - bits**2, 0) / total)
    null = (np.count_nonzero(table.sum(0)) - 1) * (len(table) - 1) / (2 * total * np.log(2))
    return interval(bits, stats.norm.ppf((1 + CONFIDENCE) / 2) * spread, 0) | {"null": null}


def _read(path: str | PathLike[str]) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            root = json.load(file)
    except OSError as error:
        raise _error(path, "", error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _error(path, "", f"no JSON: {error}") from None
    if not isinstance(root, dict):
        raise _error(path, "", "expected an object with topk_assignments")
    return root


def _under(root: dict, key: str, path: str | PathLike[str]) -> dict:
    objects = [name for name, value in root.items() if isinstance(value, dict) and "topk_assignments" in value]
    if key and key not in objects:
        raise ValueError(f"--counts: expected {path}#{' or #'.join(objects) or 'no key'}, got #{key}")
    if not key and objects and "topk_assignments" not in root:
        raise ValueError(f"--counts: {path} holds several counts; name one: {path}#{' or #'.join(objects)}")
    return root[key] if key else root


def _table(domains: object, item: str, path: str | PathLike[str]) -> Counts | None:
    if domains is None:
        return None
    if not isinstance(domains, dict) or not domains:
        raise _error(path, item, "expected {domain: counts}")
    tables = {}
    for name, rows in domains.items():
        try:
            table = np.array(rows)
        except ValueError:
            table = np.array(None)
        if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0 or (table < 0).any():
            raise _error(path, f"{item}.{name}", "expected a list of E counts for each layer, all >= 0")
        if not table.sum(1).all():
            raise _error(path, f"{item}.{name}", "expected counts, got a layer without any")
        tables[name] = table.astype(np.int64)
    if len({table.shape for table in tables.values()}) > 1:
        raise _error(path, item, "expected the same layers and experts in every domain")
    return tables


def _top_k(assigned: Counts, first: Counts | None, path: str | PathLike[str]) -> int | None:
    """K, which is the assignments over the first choices; None when these are not known."""
    if first is None:
        return None
    for name, table in assigned.items():
        top_k, rest = np.divmod(table.sum(1), first[name].sum(1))
        if rest.any() or len(np.unique(top_k)) > 1 or (first[name] > table).any():
            raise _error(path, f"top1.{name}", "expected first choices that topk_assignments count too")
    return int(top_k[0])


def _error(path: str | PathLike[str], item: str, reason: str) -> LoadError:
    return LoadError(": ".join(filter(None, [str(path), item, reason])), str(path), item, reason)
