"""Draws docs/figures/pipeline-bubble.svg from the newest record of benchmarks/bench_parallel.py. Needs matplotlib."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "mixtral", "svg.fonttype": "none", "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


STAGES = 2


def draw(record: dict | None, out: Path) -> None:
    """Without a record, the formula alone."""
    rows = [row for row in record["rows"] if row["metric"] == "busy share of the stages"] if record else []
    passes = range(1, 9)
    figure, axis = plt.subplots(figsize=(6, 2.8))
    formula = [(STAGES - 1) / (m + STAGES - 1) for m in passes]
    axis.plot(passes, formula, color="#64748b", label="(p − 1) / (m + p − 1)")
    if rows:
        measured = [int(row["case"].split()[1]) for row in rows]
        axis.plot(measured, [1 - row["value"] for row in rows], "o", color="#c2410c", label="measured")
        about = f"{record['device']}, {record['date']}, bfloat16, random weights"
        figure.text(0.995, 0.01, about, ha="right", fontsize=7)
    axis.set_xlabel(f"m, passes through p = {STAGES} stages")
    axis.set_ylabel("bubble")
    axis.set_ylim(0, 0.7)
    axis.set_xticks(passes)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    paths = sorted((ROOT / "benchmarks" / "records").glob("*-parallel.json"))
    record = json.loads(paths[-1].read_text()) if paths else None
    draw(record, ROOT / "docs" / "figures" / "pipeline-bubble.svg")
