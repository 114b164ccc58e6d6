"""Mixtral 8x7B on one GPU: random weights, as many of its 32 layers as fit, prefill and decoding of a few batches.

With fewer layers, rates are scaled by what a step then reads or computes, and every case says so.
"""

import statistics
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mixtral
from common import Bench, Row
from engines import prompts_of
from random_models import MIXTRAL_8X7B, NORM_EPS, ROPE_THETA, Shape
from roofline import Rates, rates_of

BATCHES = (1, 8, 32, 64)
GOALS = {1: 82.0, 8: 80.0}  # percentages of the bound, by batch
PROMPT, STEPS = 128, 64
PREFILL = 2048
ROUTERS = ("mixtral::topk_softmax", "mixtral::moe_route")  # ops that return (weights, ids)
RESERVE = 6 * 10**9  # bytes for activations, workspaces and what the GPU itself needs


def layers_that_fit(shape: Shape, free_bytes: int) -> int:
    """Layers whose bf16 weights and cache leave ``RESERVE`` free."""
    cache = replace(shape, layers=1).cache_bytes(max(PREFILL, max(BATCHES) * (PROMPT + STEPS + 1)))
    layer = 2 * (replace(shape, layers=1).weights - replace(shape, layers=0).weights) + cache
    room = free_bytes - RESERVE - 2 * replace(shape, layers=0).weights
    return min(shape.layers, int(room // layer))


class RouterTrace(TorchDispatchMode):
    """Counts, for every router call under it, the different experts that it chose."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        result = function(*args, **(kwargs or {}))
        if function._schema.name in ROUTERS:
            ids: Tensor = result[1]  # [T, K]
            self.chosen.append(len(ids.unique()))
        return result


def experts_read(model: mixtral.Mixtral, batch: int) -> int:
    """Experts that a decode step reads, all layers together, as routed for ``batch`` sequences of one random token."""
    with RouterTrace() as trace:
        model(torch.tensor(prompts_of(batch, 1), device=model.device))
    if len(trace.chosen) != model.config.num_layers:
        raise RuntimeError(f"experts_read: expected a router call a layer, got {len(trace.chosen)}")
    return sum(trace.chosen)


def step_bytes(shape: Shape, batch: int, experts: int) -> float:
    """What a decode step reads at least: weights, ``experts`` of them counted over all layers, keys and values."""
    layer = shape.attention_weights + shape.experts * shape.hidden
    weights = shape.layers * layer + experts * shape.expert_weights + shape.vocab * shape.hidden
    return 2 * weights + batch * shape.cache_bytes(PROMPT + STEPS // 2)


def decode_rows(model: mixtral.Mixtral, shape: Shape, full: Shape, batch: int, rates: Rates, rounds: int) -> list[Row]:
    """Tokens/s of a batch; with fewer layers than ``full`` has, what that comes to with all of them."""

    def rate() -> float:
        model.generate(prompts_of(batch, PROMPT), max_tokens=STEPS + 1, ignore_eos=True)  # the prefill gives one token
        return batch * STEPS / model.timings.decode_seconds

    rate()  # warms up
    value = statistics.median(rate() for _ in range(rounds))
    experts = experts_read(model, batch)
    traffic = step_bytes(shape, batch, experts)
    bound = batch * 1e9 * rates.bandwidth / traffic
    percent = 100 * value / bound
    case = f"8x7B bfloat16, {shape.layers} of {full.layers} layers"
    rows = [Row(case, f"decode batch {batch}", value, "tokens/s", bound, percent, goal=GOALS.get(batch))]
    if shape.layers < full.layers:
        scale = traffic / step_bytes(full, batch, round(experts * full.layers / shape.layers))
        scaled = f"8x7B bfloat16, scaled from {shape.layers} to {full.layers} layers"
        rows.append(Row(scaled, f"decode batch {batch}", value * scale, "tokens/s", bound * scale, percent))
    return rows


def prefill_rows(model: mixtral.Mixtral, shape: Shape, full: Shape, rates: Rates, rounds: int) -> list[Row]:
    """Tokens/s of one prompt; the bound is its arithmetic."""

    def rate() -> float:
        model.generate(prompts_of(1, PREFILL), max_tokens=1)
        return PREFILL / model.timings.prefill_seconds

    rate()
    value = statistics.median(rate() for _ in range(rounds))
    bound = 1e9 * rates.arithmetic * PREFILL / shape.prefill_flop(PREFILL)
    metric, percent = f"prefill {PREFILL}", 100 * value / bound
    rows = [Row(f"8x7B bfloat16, {shape.layers} of {full.layers} layers", metric, value, "tokens/s", bound, percent)]
    if shape.layers < full.layers:
        scale = shape.prefill_flop(PREFILL) / full.prefill_flop(PREFILL)
        scaled = f"8x7B bfloat16, scaled from {shape.layers} to {full.layers} layers"
        rows.append(Row(scaled, metric, value * scale, "tokens/s", bound * scale, percent))
    return rows


def random_model(shape: Shape, device: str) -> mixtral.Mixtral:
    config = mixtral.Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position=32768,
        num_experts=shape.experts,
        top_k=shape.top_k,
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
    )
    return mixtral.Mixtral.from_config(config, device, "bfloat16", chunk_size=PREFILL, max_batch=max(BATCHES))


def run_model(bench: Bench, shape: Shape, full: Shape, rounds: int) -> None:
    """All rows of ``shape``, which is ``full`` or some of its layers."""
    print(f"drawing {shape.weights / 1e9:.1f} G weights, {shape.layers} of {full.layers} layers", flush=True)
    model, rates = random_model(shape, bench.device), rates_of(bench.device, torch.bfloat16)
    bench.rows += prefill_rows(model, shape, full, rates, rounds)
    for batch in BATCHES:
        bench.rows += decode_rows(model, shape, full, batch, rates, rounds)
        print(f"  batch {batch}: {bench.rows[-1].value:.1f} tokens/s", flush=True)


def run(bench: Bench, most_layers: int, rounds: int) -> None:
    """Mixtral 8x7B on the GPU, no more than ``most_layers`` of it."""
    layers = min(most_layers, layers_that_fit(MIXTRAL_8X7B, torch.cuda.mem_get_info()[0]))
    if layers < 1:
        raise RuntimeError("model_cuda.run: the GPU must have room for one layer of Mixtral 8x7B, got none")
    run_model(bench, replace(MIXTRAL_8X7B, layers=layers), MIXTRAL_8X7B, rounds)
