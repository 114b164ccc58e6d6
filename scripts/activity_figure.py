"""Draws docs/activity.svg from the newest record of benchmarks/bench_activity.py. Needs matplotlib."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "mixtral", "svg.fonttype": "none", "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#c2410c", "#64748b", "#1e3a5f")


def main() -> None:
    path = sorted((ROOT / "benchmarks" / "records").glob("*-activity.json"))[-1]
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if row["case"].startswith("measured: ")]
    names = list(dict.fromkeys(row["case"].removeprefix("measured: ") for row in rows))
    values = {(row["case"].removeprefix("measured: "), row["metric"]): row["value"] for row in rows}
    speeds = list(dict.fromkeys(row["metric"] for row in rows if row["unit"] == "tokens/s"))
    panels = ["parameters, total", "parameters, active", *speeds]
    titles = {"parameters, total": "total parameters, 10⁹", "parameters, active": "active parameters, 10⁹"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 2.6))
    for axis, metric in zip(axes, panels, strict=True):
        heights = [values[name, metric] for name in names]
        bars = axis.bar(range(len(names)), heights, color=COLOURS)
        axis.bar_label(bars, [f"{height:.2f}" if height < 10 else f"{height:.0f}" for height in heights], padding=2)
        axis.set_title(titles.get(metric, f"{metric}, tokens/s"), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylim(0, 1.2 * max(heights))
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(bars, names, loc="lower center", ncols=3, frameon=False)
    figure.text(0.995, 0.02, f"{record['device']}, {record['date']}, bfloat16, random weights", ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    out = ROOT / "docs" / "activity.svg"
    figure.savefig(out, metadata={"Date": None})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
