"""Draws docs/figures/pipeline-bubble.svg from the newest record of benchmarks/bench_parallel.py. Needs matplotlib."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "mixtral", "svg.fonttype": "none", "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def draw(record: dict, out: Path) -> None:
    rows = [row for row in record["rows"] if row["metric"] == "busy share of the stages"]
    passes = [int(row["case"].split()[1]) for row in rows]
    figure, axis = plt.subplots(figsize=(6, 2.8))
    axis.plot(passes, [1 - row["bound"] for row in rows], color="#64748b", label="(p − 1) / (m + p − 1)")
    axis.plot(passes, [1 - row["value"] for row in rows], "o", color="#c2410c", label="measured")
    axis.set_xlabel("m, passes through p = 2 stages")
    axis.set_ylabel("bubble")
    axis.set_ylim(0, 0.7)
    axis.set_xticks(passes)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.text(0.995, 0.01, f"{record['device']}, {record['date']}, bfloat16, random weights", ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    path = sorted((ROOT / "benchmarks" / "records").glob("*-parallel.json"))[-1]
    draw(json.loads(path.read_text()), ROOT / "docs" / "figures" / "pipeline-bubble.svg")
