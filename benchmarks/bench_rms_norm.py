"""rms_norm and add_rms_norm against torch.nn.functional.rms_norm. Bound: one read and one write of every row;
backward reads the rows and their gradients and writes one gradient."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main, with_backward


def add_and_norm(x, residual, weight, hidden):
    total = x + residual
    return F.rms_norm(total, (hidden,), weight, 1e-5), total


def run(bench: Bench) -> None:
    hidden = 4096
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 128, 2048):
            x = torch.randn(tokens, hidden, device=bench.device).to(dtype)
            weight = torch.ones(hidden, device=bench.device, dtype=dtype)
            row_bytes = tokens * hidden * x.element_size()
            case = f"T={tokens} H={hidden} {dtype}"
            bench.compare(
                f"rms_norm {case}",
                lambda x=x, w=weight: ops.rms_norm(x, w, 1e-5),
                {"torch": lambda x=x, w=weight: F.rms_norm(x, (hidden,), w, 1e-5)},
                gigabytes=2 * row_bytes / 1e9,
            )
            bench.compare(
                f"add_rms_norm {case}",
                lambda x=x, w=weight: ops.add_rms_norm(x, x, w, 1e-5),
                {"torch": lambda x=x, w=weight: F.rms_norm(x + x, (hidden,), w, 1e-5)},
                gigabytes=4 * row_bytes / 1e9,
            )
            bench.compare(
                f"rms_norm and backward {case}",
                with_backward(lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight),
                {"torch": with_backward(lambda x, w: F.rms_norm(x, (hidden,), w, 1e-5), x, weight)},
                gigabytes=5 * row_bytes / 1e9,
            )
            bench.compare(
                f"add_rms_norm and backward {case}",
                with_backward(lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5), x, x, weight),
                {"torch": with_backward(lambda x, r, w: add_and_norm(x, r, w, hidden), x, x, weight)},
                gigabytes=8 * row_bytes / 1e9,
            )


if __name__ == "__main__":
    main("rms_norm", run)
