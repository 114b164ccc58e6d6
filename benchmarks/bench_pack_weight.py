"""pack_weight and unpack_weight against a copy of the weight. Bound: reading the one and writing the other, once."""

import torch

import mixtral.ops as ops
from common import Bench, main


def run(bench: Bench) -> None:
    experts, columns, depth = 2, 4096, 4096
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(experts, columns, depth, device=bench.device).to(dtype)
        for quantize in (None, "int8", "fp8", "int4"):
            packed = ops.pack_weight(weight, quantize)
            unpacked = ops.unpack_weight(packed)
            case = f"E={experts} N={columns} Kdim={depth} {dtype} quantize={quantize}"
            bench.compare(
                f"pack_weight {case}",
                lambda w=weight, q=quantize: ops.pack_weight(w, q),
                {"clone": lambda w=weight: w.clone()},
                gigabytes=(weight.nbytes + packed.nbytes) / 1e9,
            )
            bench.compare(
                f"unpack_weight {case}",
                lambda p=packed: ops.unpack_weight(p),
                {"clone": lambda u=unpacked: u.clone()},
                gigabytes=(packed.nbytes + unpacked.nbytes) / 1e9,
            )


if __name__ == "__main__":
    main("pack_weight", run, devices=("cpu",))
