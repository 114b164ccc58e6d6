"""moe_mlp against Hugging Face's eager experts (a loop that gathers, multiplies and adds) and against F.grouped_mm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mixtral.ops as ops
from common import Bench, interleaved_seconds, main


def eager(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        tokens, choice = torch.where(ids == e)
        if len(tokens):
            gate, up = F.linear(x[tokens], gate_up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down[e]) * weights[tokens, choice, None]
            out.index_add_(0, tokens, y.to(x.dtype))
    return out


def grouped(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    top_k = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    offs = ids.flatten().bincount(minlength=len(gate_up)).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offs) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // top_k, y.to(x.dtype))


def faster(a: Callable, b: Callable, device: str) -> tuple[Callable, str]:
    """The better of the two peers here, and its name."""
    seconds = interleaved_seconds(a, b, device)
    return (a, "torch eager") if seconds[0] <= seconds[1] else (b, "torch grouped_mm")


def run_layer(bench: Bench, hidden: int, intermediate: int, dtype: torch.dtype, token_counts: tuple[int, ...]) -> None:
    """One expert layer of a shape, ours against the better peer."""
    experts, top_k = 8, 2
    gate_up = torch.empty(experts, 2 * intermediate, hidden, device=bench.device, dtype=dtype).normal_(0, hidden**-0.5)
    down = torch.empty(experts, hidden, intermediate, device=bench.device, dtype=dtype).normal_(0, intermediate**-0.5)
    on_cpu = bench.device == "cpu"  # where weights are packed once, as the model's are
    ours_gate_up, ours_down = (ops.pack_weight(weight) if on_cpu else weight for weight in (gate_up, down))
    for tokens in token_counts:
        x = torch.randn(tokens, hidden, device=bench.device).to(dtype)
        weights, ids = ops.topk_softmax(torch.randn(tokens, experts, device=bench.device), top_k)
        expert_elements = 3 * hidden * intermediate
        # Few tokens are bound by reading the weights of the chosen experts, many by arithmetic.
        if tokens < 64:
            work = {"gigabytes": len(ids.unique()) * expert_elements * x.element_size() / 1e9}
        else:
            work = {"gflop": 2 * tokens * top_k * expert_elements / 1e9}
        arguments = (x, weights, ids, gate_up, down)
        peer, peer_name = faster(lambda a=arguments: eager(*a), lambda a=arguments: grouped(*a), bench.device)
        bench.compare(
            f"T={tokens} H={hidden} I={intermediate} E={experts} K={top_k} {dtype}",
            lambda x=x, w=weights, i=ids: ops.moe_mlp(x, w, i, ours_gate_up, ours_down),
            peer,
            peer_name,
            **work,
        )


def run(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run_layer(bench, 2048, 7168, dtype, (1, 4, 128, 512))
    run_layer(bench, 4096, 14336, torch.bfloat16, (1, 16, 128, 512, 2048))  # a layer of Mixtral 8x7B


if __name__ == "__main__":
    main("moe_mlp", run)
