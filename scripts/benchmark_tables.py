"""Writes docs/benchmarks.md and the table of README from benchmarks/records: ``benchmark_tables.py``."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- scripts/benchmark_tables.py writes this table -->", "<!-- end of the table -->"
PAGE = """# Benchmarks

`scripts/benchmark_tables.py` writes this page from the newest record of each name and device in
[`benchmarks/records/`](../benchmarks/records/). Nothing here was measured on a GPU.

- Functions and engines take turns in one run; medians count. × is our rate over the peer's.
- The bound is the rate at which the least memory traffic or the useful arithmetic could be done, as measured in the
  same run. A value above it means that the machine was slower when the bound was measured.
- A case of a model is a shape, a dtype and, where given, the instruction set that all engines were held to; `no_amx` is
  everything that the processor has but AMX. The shapes are Mixtral models with random weights: `mini` (0.21 B
  parameters), `small` (1.3 B), `mid` (3.0 B) and `wide2` (two layers of 8x7B, 3.2 B). llama.cpp is built for the
  processor, or for the instruction set; it has Q8_0 for int8 and Q4_K_M for int4.
- The bound of decoding is reading the weights of a token from memory. That of a prefill is the processor's f32
  multiply-adds, where the instruction set has none for bf16. Both rates are measured in each round.
- *weights / peak memory* is 1 when a process holds its weights and nothing else. The engines run in Python processes;
  *of the binary* is without Python.

| what | command |
|---|---|
| all ops, and one model, as it is and held to AVX2 | `python benchmarks/run_all.py` |
| one op | `python benchmarks/bench_<op>.py --record` |
| a model against its peers | `python benchmarks/bench_model.py --isa native,avx2 --llama-avx2 FOLDER --record` |
| training beside transformers | `python benchmarks/bench_train.py --record` |
| GGUF files against llama.cpp | `cd benchmarks && python -m peers.compare_gguf --record` |
| ops and plug-in on later versions of torch and transformers | `scripts/check_torch_versions.sh` |
"""
# README's columns: dtype and metric, the heading. Its lines are the processors, each with the first of MODELS that it
# has, as it is and held to AVX2.
COLUMNS = {
    ("bfloat16", "prefill 512"): "reading a prompt of 512, bf16",
    ("bfloat16", "decode"): "writing, bf16",
    ("int8", "decode"): "writing, int8",
    ("int4", "decode"): "writing, int4",
}
MODELS = ("mid", "small")
SETS = {"amx": "AMX", "avx512_bf16": "AVX-512 with BF16", "avx512": "AVX-512", "avx2": "AVX2", "baseline": "SSE2"}


def newest_records(folder: Path) -> list[dict]:
    """One record for each (name, device), sorted by them."""
    newest = {}
    for path in sorted(folder.glob("*.json")):  # a name starts with its date
        record = json.loads(path.read_text())
        newest[record["name"], record["device"]] = record
    return [newest[key] for key in sorted(newest)]


def number(value: float) -> str:
    """Three significant digits, but no exponent and no rounding of whole digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells_of(rows: list[dict], peers: list[str]) -> list[str]:
    """The value, its percentage of the bound, and every peer, from all rows of one (case, metric, unit)."""
    percents = [row["percent_of_bound"] for row in rows if row["percent_of_bound"] is not None]
    beside = {
        row["peer"]: f"{number(row['peer_value'])} (×{row['ratio']:.2f})" for row in rows if row["ratio"] is not None
    }
    value = f"{number(rows[0]['value'])} {rows[0]['unit']}"
    return [value, f"{percents[0]:.0f} %" if percents else "", *[beside.get(peer, "") for peer in peers]]


def table(record: dict) -> str:
    """Everything in one record: a line for each thing measured, a column for each peer."""
    groups: dict[tuple, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault((row["case"], row["metric"], row["unit"]), []).append(row)
    peers = list(dict.fromkeys(row["peer"] for row in record["rows"] if row["ratio"] is not None))
    lines = [line(["case", "measured", "ours", "of bound", *peers]), "|---" * (4 + len(peers)) + "|"]
    lines += [line([case, metric, *cells_of(rows, peers)]) for (case, metric, _), rows in groups.items()]
    return "\n".join(lines)


def page(records: list[dict]) -> str:
    """docs/benchmarks.md."""
    parts = [PAGE]
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        origin = f"{record['device']}, {record['date']}, commit {record['commit'][:7]}; {versions}."
        parts.append(f"## {record['name']}\n\n{origin}\n\n{table(record)}\n")
    return "\n".join(parts)


def against_best_peer(rows: list[dict], metric: str) -> str:
    """Ours, and how it compares with the peer of the largest value; empty where no peer was measured."""
    compared = [
        row for row in rows if row["metric"] == metric and row["ratio"] is not None and row["peer"] != "ours, batch 1"
    ]
    if not compared:
        return ""
    best = max(compared, key=lambda row: row["peer_value"])
    return f"{number(best['value'])}, {best['ratio']:.2f} × {best['peer']}"


def readme_table(records: list[dict]) -> str:
    """A line for each processor, and for each that was held to AVX2 as well; every cell with the best of the peers."""
    lines = [line(["tokens/s", *COLUMNS.values()]), "|---" * (1 + len(COLUMNS)) + "|"]
    for record in (record for record in records if record["name"] == "model"):
        cases = {row["case"] for row in record["rows"]}
        model = next((model for model in MODELS if f"{model} bfloat16" in cases), None)
        device = re.sub(r"\(R\)| Processor| \(family.*\)", "", record["device"])
        native = SETS[record["versions"]["instruction set"]]
        for held, label in (("", native), (" avx2", f"{native} held to AVX2")):
            if f"{model} bfloat16{held}" in cases:
                cells = (
                    against_best_peer(
                        [row for row in record["rows"] if row["case"] == f"{model} {dtype}{held}"], metric
                    )
                    for dtype, metric in COLUMNS
                )
                lines.append(line([f"{device}, {label}", *cells]))
    return "\n".join(lines)


def with_table(readme: str, records: list[dict]) -> str:
    """``readme`` with a fresh table between the markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{readme_table(records)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    records = newest_records(ROOT / "benchmarks" / "records")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), records))
    (ROOT / "docs" / "benchmarks.md").write_text(page(records))
