"""grouped_gemm at Mixtral's shapes against a loop of torch.nn.functional.linear over the experts, of plain weights."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main, with_backward


def loop(a: torch.Tensor, b: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The loop is given its offsets on the host: it needs no synchronisation."""
    starts = [0, *ends[:-1]]
    return torch.cat([F.linear(a[s:e], b[i]) for i, (s, e) in enumerate(zip(starts, ends, strict=True)) if e > s])


def run(bench: Bench) -> None:
    experts, columns, depth = 8, 4096, 4096
    formats = [(torch.float32, None), (torch.bfloat16, None)]
    if bench.device == "cuda":
        formats += [(torch.bfloat16, "fp8"), (torch.bfloat16, "int4")]
    for dtype, quantize in formats:
        b = torch.randn(experts, columns, depth, device=bench.device).to(dtype) / depth**0.5
        ours = ops.pack_weight(b.cpu(), quantize).to(bench.device) if quantize else b
        for rows in (1, 8, 32, 256, 1024):
            a = torch.randn(rows, depth, device=bench.device).to(dtype)
            ends = [rows * (e + 1) // experts for e in range(experts)]
            offs = torch.tensor(ends, dtype=torch.int32, device=bench.device)
            case = f"M={rows} E={experts} N={columns} Kdim={depth} {quantize or dtype}"
            active = sum(end > start for start, end in zip([0, *ends], ends, strict=False))
            bench.compare(
                case,
                lambda a=a, b=ours, o=offs: ops.grouped_gemm(a, b, o),
                {"torch loop": lambda a=a, b=b, e=ends: loop(a, b, e)},
                gigabytes=active * ours.nbytes / experts / 1e9,
                gflop=2 * rows * columns * depth / 1e9,
                dtype=dtype,
            )
            if not quantize and rows >= experts:
                bench.compare(
                    f"forward and backward {case}",
                    with_backward(lambda a, b, o=offs: ops.grouped_gemm(a, b, o), a, b),
                    {"torch loop": with_backward(lambda a, b, e=ends: loop(a, b, e), a, b)},
                    gigabytes=3 * b.nbytes / 1e9,
                    gflop=6 * rows * columns * depth / 1e9,
                    dtype=dtype,
                )


if __name__ == "__main__":
    main("grouped_gemm", run)
