"""Writes docs/benchmarks.md and the table of README from benchmarks/records: ``benchmark_tables.py``."""

import json
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
  parameters), `mid` (3.0 B) and `wide2` (two layers of 8x7B, 3.2 B). llama.cpp has Q8_0 for int8 and Q4_K_M for int4.
- *weights / peak memory* is 1 when a process holds its weights and nothing else. The engines run in Python processes;
  *of the binary* is without Python.

| what | command |
|---|---|
| all ops, and the model on older instruction sets | `python benchmarks/run_all.py` |
| one op | `python benchmarks/bench_<op>.py --record` |
| models against transformers and llama.cpp | `python benchmarks/bench_model.py --models mini,mid,wide2 --record` |
| GGUF files against llama.cpp | `python benchmarks/compare_gguf.py --record` |
| ops and plug-in on later versions of torch and transformers | `scripts/check_torch_versions.sh` |
"""
# README's lines: what the processor could use, the record, the case.
LINES = (
    ("AMX, bf16", "model", "mid bfloat16"),
    ("AMX, int4", "model", "mid int4"),
    ("AVX-512 without AMX, bf16", "model-isa", "mid bfloat16 no_amx"),
    ("AVX2, bf16", "model-isa", "mid bfloat16 avx2"),
)
COLUMNS = {
    "prefill 512": "reading a prompt of 512, tokens/s",
    "decode": "writing, tokens/s",
    "weights / peak memory": "weights / peak memory",
}


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
    """A line for each instruction set and dtype that was measured, each with the best of the peers."""
    lines = [line(["", *COLUMNS.values()]), "|---" * (1 + len(COLUMNS)) + "|"]
    for label, name, case in LINES:
        for record in records:
            rows = [row for row in record["rows"] if row["case"] == case]
            if record["name"] == name and rows:
                device = record["device"].replace("(R)", "").removesuffix(" Processor")
                lines.append(line([f"{device}, {label}", *(against_best_peer(rows, metric) for metric in COLUMNS)]))
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
