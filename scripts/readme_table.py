"""Writes the tables of README's "Numbers" from benchmarks/records, between two markers: ``readme_table.py``.

A table for the newest record of each name and device that has goals: a line for each thing measured that has one, a
column for each peer. Everything else stays in the records.
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


def with_goal(text: str, goal: float | None) -> str:
    """``text``, and the goal that it has to reach."""
    return text if goal is None else f"{text}, goal {number(goal)}"


def cells_of(rows: list[dict], peers: list[str]) -> list[str]:
    """The value, its percentage of the bound, and every peer, from all rows of one (case, metric, unit)."""
    value, percent, beside = f"{number(rows[0]['value'])} {rows[0]['unit']}", "", {}
    for row in rows:
        if row["ratio"] is not None:
            ratio = with_goal(f"×{row['ratio']:.2f}", row["goal"])
            beside[row["peer"]] = f"{number(row['peer_value'])} ({ratio})"
        elif row["peer"] is None and row["percent_of_bound"] is not None:
            percent = with_goal(f"{row['percent_of_bound']:.0f} %", row["goal"])
        elif row["peer"] is None:
            value = with_goal(value, row["goal"])
    return [value, percent, *[beside.get(peer, "") for peer in peers]]


def groups_with_goals(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows by (case, metric, unit), where one of them has a goal."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["metric"], row["unit"]), []).append(row)
    return {key: group for key, group in groups.items() if any(row["goal"] is not None for row in group)}


def table(record: dict) -> str:
    """Markdown of one record."""
    groups = groups_with_goals(record["rows"])
    peers = list(dict.fromkeys(row["peer"] for rows in groups.values() for row in rows if row["ratio"] is not None))
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
    return before + "\n\n".join([BEGIN, *map(table, [r for r in records if groups_with_goals(r["rows"])]), END]) + after


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), newest_records(ROOT / "benchmarks" / "records")))
