"""The expert layer of Mixtral 8x7B against what PyTorch has for it; the fastest peer of a case counts.

The peers: Hugging Face's eager loop over experts (on the CPU; it synchronises with the host), F.grouped_mm with the
torch ops around it, and, where transformers is installed, its implementations of the experts (on CUDA; on the CPU
they are the other two). They multiply bf16; on CUDA, quantised weights are measured against them as well.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mixtral.ops as ops
from common import Bench, Row, main
from timing import take_turns

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4096, 14336, 8, 2
TOKENS = {"cpu": (1, 8, 512, 2048), "cuda": (1, 4, 16, 64, 128, 256, 512, 4096, 8192, 16384)}
ROUTINGS = {"cpu": ("uniform",), "cuda": ("uniform", "Zipf", "one pair")}
BUDGET = {"cpu": 6.0, "cuda": 1.0}  # seconds for a case

QUANTISED, QUANTISED_TOKENS = ("fp8", "int4"), (1, 16, 64)  # on CUDA


@dataclass(frozen=True)
class Experts:
    """Weights of one layer, as the peers and as our kernels read them."""

    gate_up: Tensor  # [E, 2I, H]
    down: Tensor  # [E, H, I]
    ours_gate_up: Tensor  # on the CPU or quantised packed, as the model's are
    ours_down: Tensor
    quantize: str | None = None

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert, as our kernels read it."""
        return (self.ours_gate_up.nbytes + self.ours_down.nbytes) / len(self.down)


def make_experts(device: str, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> Experts:
    """Random-normal weights; one expert's, copied: what they say costs no time, drawing them does."""

    def draw(rows: int, columns: int) -> Tensor:
        one = torch.randn(rows, columns, device=device).mul_(columns**-0.5).bfloat16()
        return one.repeat(EXPERTS, 1, 1)

    gate_up, down = draw(2 * intermediate, hidden), draw(hidden, intermediate)
    return as_ours(gate_up, down, None)


def as_ours(gate_up: Tensor, down: Tensor, quantize: str | None) -> Experts:
    """Packing is done on the CPU: one expert's weights, copied again."""

    def pack(weight: Tensor) -> Tensor:
        one = ops.pack_weight(weight[:1].cpu(), quantize)
        return torch.cat([one.to(weight.device)] * EXPERTS)

    packed = quantize is not None or gate_up.device.type == "cpu"
    ours = (pack(gate_up), pack(down)) if packed else (gate_up, down)
    return Experts(gate_up, down, *ours, quantize)


def route(routing: str, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """[T, K] weights and expert ids: random, skewed to the first experts, or the same two experts for all."""
    ranks = torch.arange(1, EXPERTS + 1, device=device)
    logits = {
        "uniform": torch.zeros(EXPERTS, device=device),
        "Zipf": -ranks.log(),
        "one pair": torch.where(ranks > TOP_K, -torch.inf, 0.0),
    }[routing]
    # With Gumbel noise the K largest are a draw without replacement in proportion to exp(logits).
    noise = -torch.empty(tokens, EXPERTS, device=device).exponential_().log()
    return ops.topk_softmax(logits + noise, TOP_K)


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
    """Without host synchronisation, so that a graph can hold it."""
    tokens, top_k = ids.shape
    sorted_ids, order = ids.flatten().sort(stable=True)
    offs = torch.searchsorted(sorted_ids, torch.arange(len(gate_up), device=x.device), right=True, out_int32=True)
    gate, up = F.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offs)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return (y[place].view(tokens, top_k, -1) * weights[..., None]).sum(1).to(x.dtype)


def peers_of(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, quick: bool = False) -> dict[str, Callable]:
    """With ``quick``, none whose import takes seconds."""
    arguments = (x, weights, ids, experts.gate_up, experts.down)
    peers = {"torch grouped_mm": lambda: grouped(*arguments)}
    if x.device.type == "cpu":
        return peers | {"torch eager": lambda: eager(*arguments)}
    if not quick and importlib.util.find_spec("transformers"):
        peers |= transformers_peers(x, weights, ids, experts)
    return peers


def transformers_peers(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts) -> dict[str, Callable]:
    """transformers' MixtralExperts; batched_mm, which gathers a copy of the weights for every row, for few tokens."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def layer(implementation: str) -> Callable:
        sizes = {"hidden_size": x.shape[1], "intermediate_size": experts.down.shape[2], "num_local_experts": EXPERTS}
        config = MixtralConfig(**sizes, experts_implementation=implementation)
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj = torch.nn.Parameter(experts.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(experts.down, requires_grad=False)
        long_ids, model_weights = ids.long(), weights.to(x.dtype)
        return lambda: module(x, long_ids, model_weights)

    names = ["grouped_mm"] + ["batched_mm"] * (len(x) <= 4)
    return {f"transformers {name}": layer(name) for name in names}


def work_of(tokens: int, chosen: int, hidden: int, intermediate: int, expert_bytes: float) -> dict[str, float]:
    """Arithmetic of T * K rows; traffic of the chosen experts' weights, the inputs and the outputs."""
    return {
        "gflop": 2 * tokens * TOP_K * 3 * hidden * intermediate / 1e9,
        "gigabytes": (chosen * expert_bytes + 4 * tokens * hidden) / 1e9,
    }


def run_case(bench: Bench, experts: Experts, routing: str, tokens: int, name: str, quick: bool = False) -> None:
    """Ours against the peers; ``quick`` as in ``peers_of``."""
    hidden, intermediate = experts.down.shape[1:]
    x = torch.randn(tokens, hidden, device=bench.device).bfloat16()
    weights, ids = route(routing, tokens, bench.device)
    bench.compare(
        f"{name} T={tokens} {routing}",
        lambda: ops.moe_mlp(x, weights, ids, experts.ours_gate_up, experts.ours_down),
        peers_of(x, weights, ids, experts, quick),
        **work_of(tokens, len(ids.unique()), hidden, intermediate, experts.expert_bytes),
        budget=BUDGET[bench.device],
    )


def run_router(bench: Bench, experts: Experts, tokens: int, name: str) -> None:
    """How many times as long the layer takes as choosing the experts and sorting the rows."""
    hidden = experts.down.shape[1]
    x = torch.randn(tokens, hidden, device=bench.device).bfloat16()
    router = torch.randn(EXPERTS, hidden, device=bench.device).mul_(hidden**-0.5)
    weights, ids = ops.moe_route(x, router, TOP_K)
    samples = take_turns(
        {
            "layer": lambda: ops.moe_mlp(x, weights, ids, experts.ours_gate_up, experts.ours_down),
            "router": lambda: ops.moe_permute(x, ops.moe_route(x, router, TOP_K)[1], EXPERTS),
        },
        bench.device,
    )
    ratio = samples["layer"].seconds / samples["router"].seconds
    bench.rows.append(Row(f"{name} T={tokens}", "moe_mlp / (moe_route + moe_permute)", ratio, "x"))
    microseconds = 1e6 * samples["router"].seconds
    print(f"{name} T={tokens}: moe_route + moe_permute {microseconds:.1f} us, the layer takes {ratio:.1f} x as long")


def run(bench: Bench) -> None:
    experts = make_experts(bench.device)
    for tokens in TOKENS[bench.device]:
        for routing in ROUTINGS[bench.device]:
            run_case(bench, experts, routing, tokens, "8x7B")
    if bench.device == "cuda":
        for quantize in QUANTISED:
            quantised = as_ours(experts.gate_up, experts.down, quantize)
            for tokens in QUANTISED_TOKENS:
                run_case(bench, quantised, "uniform", tokens, f"8x7B {quantize}")
        run_router(bench, experts, 4096, "8x7B")


if __name__ == "__main__":
    main("moe_mlp", run)
