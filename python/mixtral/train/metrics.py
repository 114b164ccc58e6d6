"""What a run reports: metrics.jsonl, TensorBoard, the progress bar, and the figure at the end."""

import json
import os
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import replace_file

FILE = "metrics.jsonl"
DEAD = 0.01  # an expert with less of its even share is dead


def expert_statistics(load: Tensor) -> dict[str, float]:
    """How evenly the experts are used.

    Args:
        load: choices of each expert, [L, E].

    Returns:
        load_cv: standard deviation over mean, the mean of the layers. max_violation: MaxVio = max load / mean load - 1
        (Wang et al., 2408.15664), of the worst layer. max_load_share: the largest share of the choices of a layer.
        dead_experts: experts with less than 1 % of their even share, in all layers.
    """
    load = load.double()
    even = load.mean(-1, keepdim=True).clamp(min=1e-30)
    return {
        "load_cv": float((load.std(-1, correction=0) / even[:, 0]).mean()),
        "max_violation": float((load / even).max()) - 1,
        "max_load_share": float((load / load.sum(-1, keepdim=True).clamp(min=1e-30)).max()),
        "dead_experts": int((load < DEAD * even).sum()),
    }


def flops_per_token(model: nn.Module) -> int:
    """Operations of a forward and a backward pass for one token, without attention's scores: 6 for each weight that
    takes part (of the experts top_k; the embedding table is only read)."""
    total = 0
    for name, p in model.named_parameters():
        if p.dim() < 2 or "embed_tokens" in name:
            continue
        chosen = model.config.top_k / model.config.num_experts if ".experts." in name else 1
        total += round(p.numel() * chosen)
    return 6 * total


def peak_memory(device: str) -> int:
    """The most bytes that this process has held: on the GPU, or in memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a crash cut off is left out."""
    path = out / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Reporter:
    """Writes the rows of a run as they come. Only the first rank has one that does anything."""

    def __init__(self, out: Path, first_step: int, total: int | None, active: bool) -> None:
        """
        Args:
            first_step: that of the checkpoint to go on from; rows of later steps are dropped.
            total: steps of the whole run; None: it ends by the clock.
            active: False: report nothing.
        """
        self.active = active
        if not active:
            return
        kept = [row for row in read(out) if row["step"] <= first_step] if first_step else []
        replace_file(out / FILE, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(out / FILE, "a", encoding="utf-8")  # noqa: SIM115
        self.board = _tensorboard(out, first_step)
        self.terminal = sys.stderr.isatty()
        self.bar = _bar(first_step, total) if self.terminal else None
        self.last_line = time.monotonic()

    def row(self, row: dict[str, Any]) -> None:
        """One step, or one evaluation."""
        if not self.active:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in _flat(row).items():
                self.board.add_scalar(name, value, row["step"])

    def progress(self, step: int, done: float, row: dict[str, Any]) -> None:
        """The bar on a terminal; elsewhere a line every half minute."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(f"loss {row['cross_entropy']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
        elif time.monotonic() - self.last_line > 30:
            self.last_line = time.monotonic()
            rate = f"{row['tokens_per_second']:,.0f} tokens/s"
            self.say(f"step {step} ({done:.1%}): loss {row['cross_entropy']:.3f}, {rate}")

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends bar and files; metrics.jsonl is synced."""
        if not self.active:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            flat[prefix + name] = value
    return flat


def _tensorboard(out: Path, first_step: int) -> Any:
    """A writer, where tensorboard is installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)


def _bar(first_step: int, total: int | None) -> Any:
    """A tqdm bar, where tqdm is installed."""
    if find_spec("tqdm") is None:
        return None
    from tqdm import tqdm

    return tqdm(initial=first_step, total=total, unit="step", dynamic_ncols=True)


def draw(out: Path) -> None:
    """Draws metrics.jsonl into loss.svg and loss.png: the loss, and the held-out bits per byte where there are any.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = read(out)
    steps = [row for row in rows if "cross_entropy" in row]
    scores: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for domain, score in row.get("evaluation", {}).items():
            if score.get("bits_per_byte") is not None:
                scores.setdefault(domain, []).append((row["step"], score["bits_per_byte"]))
    with rc_context({"svg.hashsalt": "mixtral", "svg.fonttype": "none", "axes.spines.top": False}):
        figure = Figure(figsize=(10 if scores else 6.4, 4), layout="constrained")
        axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
        axes[0].plot([r["step"] for r in steps], [r["cross_entropy"] for r in steps], lw=0.5, color="#9bb8d9")
        axes[0].plot([r["step"] for r in steps], _smooth([r["cross_entropy"] for r in steps]), color="#1f5fa8")
        axes[0].set(xlabel="step", ylabel="cross-entropy, nats per token", title="training")
        if scores:
            for domain, points in scores.items():
                axes[1].plot(*zip(*points, strict=True), marker="o", ms=3, label=domain)
            axes[1].set(xlabel="step", ylabel="bits per byte", title="held out")
            axes[1].legend()
        for kind in ("svg", "png"):
            figure.savefig(out / f"loss.{kind}", metadata={"Date": None} if kind == "svg" else None)


def _smooth(values: list[float]) -> list[float]:
    """An exponential mean over about 50 steps."""
    smooth: list[float] = []
    for n, value in enumerate(values):
        keep = min(0.98, n / (n + 1))
        smooth.append(value if not smooth else keep * smooth[-1] + (1 - keep) * value)
    return smooth
