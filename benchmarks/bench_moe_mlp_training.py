"""The expert layer of Mixtral 8x7B forward and backward, with the gradients of all its inputs, against the experts of
transformers (grouped_mm), on the CPU.

In bf16 where the processor has products of bf16, else in f32: PyTorch's products of bf16 are plain loops there, and
transformers takes 204 seconds for 64 tokens on a Zen 3 (ours 2).

Bound: three products for each of the forward pass, or three passes over the weights: two that read them and one that
writes their gradients. It needs 10 GB of memory in bf16, 18 GB in f32.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mixtral.ops as ops
from bench_moe_mlp import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, route
from common import Bench, main, native_isa, with_backward

TOKENS = (256, 512)
BUDGET = 20.0  # seconds for a case


def transformers_experts() -> MixtralExperts:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS}
    with torch.device("meta"):
        return MixtralExperts(MixtralConfig(**sizes, experts_implementation="grouped_mm"))


def draw(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random-normal weights of one expert, copied."""
    return torch.randn(rows, columns).mul_(columns**-0.5).to(dtype).repeat(EXPERTS, 1, 1)


def run(bench: Bench) -> None:
    dtype = torch.bfloat16 if native_isa() in ("avx512_bf16", "amx") else torch.float32
    module = transformers_experts()
    gate_up, down = draw(2 * INTERMEDIATE, HIDDEN, dtype), draw(HIDDEN, INTERMEDIATE, dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN).to(dtype)
        weights, ids = route("uniform", tokens, "cpu")
        long_ids = ids.long()

        def ours(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor = ids) -> Tensor:
            return ops.moe_mlp(x, weights, ids, gate_up, down)

        def peer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor = long_ids) -> Tensor:
            parameters = {"gate_up_proj": gate_up, "down_proj": down}
            return functional_call(module, parameters, (x, ids, weights.to(x.dtype)))

        bench.compare(
            f"8x7B forward and backward, {str(dtype)[6:]}, T={tokens}",
            with_backward(ours, x, weights, gate_up, down),
            {"transformers grouped_mm": with_backward(peer, x, weights, gate_up, down)},
            gflop=3 * 2 * tokens * TOP_K * 3 * HIDDEN * INTERMEDIATE / 1e9,
            gigabytes=3 * (gate_up.nbytes + down.nbytes) / 1e9,
            dtype=dtype,
            budget=BUDGET,
        )


if __name__ == "__main__":
    main("moe_mlp_training", run, devices=("cpu",))
