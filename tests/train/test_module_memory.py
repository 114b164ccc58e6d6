"""What the model for training keeps for backward: the bytes of the formula, far less than plain autograd."""

import pytest
import torch

from mixtral.train import Mixtral
from training_models import random_batch, small_config

# The proportions of Mixtral 8x7B.
SIZES = {"hidden_size": 64, "intermediate_size": 224, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
TOKENS, TOP_K, EXPERTS = 130, 2, 8
H, I, NQ, NKV, D = SIZES.values()  # noqa: E741


def saved_bytes(layers: int, recompute: str, dtype: torch.dtype, checkpointing: bool = False) -> int:
    """Bytes of the storages, but for the weights', that autograd keeps of one loss."""
    config = small_config(**SIZES, num_experts=EXPERTS, num_layers=layers)
    model = Mixtral.from_config(config, dtype, recompute=recompute, gradient_checkpointing=checkpointing)
    storages: dict[int, torch.UntypedStorage] = {}  # themselves, so that none is freed and its address used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model.loss(random_batch(config, (60, 70)))
    assert losses.total.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_bytes_of_a_layer(recompute: str, dtype: torch.dtype) -> None:
    in_dtype = {
        "the residual stream, twice, and what the norms make of it": 4 * H,
        "queries, keys, values": (NQ + 2 * NKV) * D,
        "attention's result": NQ * D,
        "pre-activations": 0 if recompute == "all" else TOP_K * 2 * I,
        "activations": TOP_K * I if recompute == "none" else 0,
    }
    in_f32 = {"log-sum-exp": NQ, "router logits": EXPERTS, "weights and experts chosen": 2 * TOP_K}
    expected = TOKENS * (dtype.itemsize * sum(in_dtype.values()) + 4 * sum(in_f32.values()))
    layer = saved_bytes(3, recompute, dtype) - saved_bytes(2, recompute, dtype)
    small = 64  # per linear layer an end offset
    assert 0 <= layer - expected <= small


def test_gradient_checkpointing_keeps_the_stream_and_the_routing() -> None:
    layer = saved_bytes(3, "act", torch.bfloat16, True) - saved_bytes(2, "act", torch.bfloat16, True)
    assert layer <= TOKENS * (2 * 2 * H + 4 * EXPERTS + 2 * 4 * TOP_K)


def test_share_of_plain_autograd() -> None:
    """Of an expert layer: rows for each expert, gate, up, silu, product and results against what ours keeps."""
    plain = TOP_K * (H + 4 * I + H)
    none, act, every = (
        saved_bytes(3, how, torch.bfloat16) - saved_bytes(2, how, torch.bfloat16) for how in ("none", "act", "all")
    )
    x = TOKENS * 2 * H
    experts = {"none": none - every + x, "act": act - every + x, "all": x}
    assert experts["act"] <= 0.47 * TOKENS * 2 * plain
    assert experts["all"] <= 0.04 * TOKENS * 2 * plain
