"""Writes the tables of README's "Numbers" from benchmarks/records, between two markers: ``readme_table.py``.

A table for the newest record of each name and device: a line for each thing measured, a column for each peer.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tables: scripts/readme_table.py writes them -->", "<!-- end of tables -->"


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


def cells_of(rows: list[dict], peers: list[str]) -> list[str]:
    """The value, its percentage of the bound, and every peer, from all rows of one (case, metric, unit)."""
    percents = [f"{row['percent_of_bound']:.0f} %" for row in rows if row["percent_of_bound"] is not None]
    beside = {
        row["peer"]: f"{number(row['peer_value'])} (×{row['ratio']:.2f})" for row in rows if row["ratio"] is not None
    }
    value = f"{number(rows[0]['value'])} {rows[0]['unit']}"
    return [value, percents[0] if percents else "", *[beside.get(peer, "") for peer in peers]]


def table(record: dict) -> str:
    """Markdown of one record."""
    groups: dict[tuple, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault((row["case"], row["metric"], row["unit"]), []).append(row)
    peers = list(dict.fromkeys(row["peer"] for row in record["rows"] if row["ratio"] is not None))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"`{record['name']}` on {record['device']}, {record['date']}, commit {record['commit'][:7]}; {versions}",
        "",
        "| " + " | ".join(["case", "measured", "ours", "of bound", *[f"{peer} (ours ×)" for peer in peers]]) + " |",
        "|---" * (4 + len(peers)) + "|",
    ]
    for (case, metric, _), rows in groups.items():
        lines.append("| " + " | ".join([case, metric, *cells_of(rows, peers)]) + " |")
    return "\n".join(lines)


def with_tables(readme: str, records: list[dict]) -> str:
    """``readme`` with fresh tables between the markers."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return before + "\n\n".join([BEGIN, *map(table, records), END]) + after


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), newest_records(ROOT / "benchmarks" / "records")))
