"""swiglu against silu(gate) * up. Bound: one read of both halves, one write; backward reads the halves and one
gradient and writes two."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main, with_backward


def eager(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def run(bench: Bench) -> None:
    intermediate = 14336
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (2, 256, 1024):
            gate_up = torch.randn(rows, 2 * intermediate, device=bench.device).to(dtype)
            bench.compare(
                f"M={rows} I={intermediate} {dtype}",
                lambda x=gate_up: ops.swiglu(x),
                {"torch": lambda x=gate_up: eager(x)},
                gigabytes=3 * rows * intermediate * gate_up.element_size() / 1e9,
            )
            bench.compare(
                f"forward and backward M={rows} I={intermediate} {dtype}",
                with_backward(ops.swiglu, gate_up),
                {"torch": with_backward(eager, gate_up)},
                gigabytes=8 * rows * intermediate * gate_up.element_size() / 1e9,
            )


if __name__ == "__main__":
    main("swiglu", run)
