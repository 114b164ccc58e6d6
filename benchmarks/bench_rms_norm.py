"""rms_norm and add_rms_norm against torch.nn.functional.rms_norm. Bound: one read and one write of every row."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main


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


if __name__ == "__main__":
    main("rms_norm", run)
