"""Mixtral 8x7B on one GPU: random weights in bf16, fp8 and int4, as many of its 32 layers as fit, prefill and decoding
of a few batches.

With fewer layers, rates are scaled by what a step then reads or computes, and every case says so.
"""

import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mixtral
from common import Bench, Row
from peers.engines import prompts_of
from random_models import BYTES_PER_WEIGHT, MIXTRAL_8X7B, Shape, model_config
from roofline import Rates, rates_of

ARITHMETIC = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int4": torch.bfloat16}
BATCHES = (1, 8, 32, 64)
PROMPT, STEPS = 128, 64
PREFILL = 2048
ROUTERS = ("mixtral::topk_softmax", "mixtral::moe_route")  # ops that return (weights, ids)
RESERVE = 6 * 10**9  # bytes for activations, workspaces and what the GPU itself needs


def layers_that_fit(shape: Shape, free_bytes: int, dtype: str) -> int:
    """Layers whose weights and cache leave ``RESERVE`` free."""
    one, none = replace(shape, layers=1), replace(shape, layers=0)
    cache = one.cache_bytes(max(PREFILL, max(BATCHES) * (PROMPT + STEPS + 1)))
    layer = one.weight_bytes(dtype) - none.weight_bytes(dtype) + cache
    room = free_bytes - RESERVE - none.weight_bytes(dtype)
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


def step_bytes(shape: Shape, dtype: str, batch: int, experts: int) -> float:
    """What a decode step reads at least: weights, ``experts`` of them counted over all layers, keys and values."""
    matrices = shape.layers * shape.attention_weights + experts * shape.expert_weights + shape.vocab * shape.hidden
    weights = BYTES_PER_WEIGHT[dtype] * matrices + 2 * shape.layers * shape.experts * shape.hidden
    return weights + batch * shape.cache_bytes(PROMPT + STEPS // 2)


@dataclass(frozen=True)
class Run:
    """A model that is measured: ``shape`` is ``full``, or some of its layers."""

    model: mixtral.Mixtral
    shape: Shape
    full: Shape
    rates: Rates
    rounds: int

    @property
    def dtype(self) -> str:
        return self.model.weight_type

    def rows(self, metric: str, value: float, bound: float, scale: float) -> list[Row]:
        """Tokens/s as measured; with fewer layers also ``scale`` times as much, what that comes to with all of them."""
        layers, percent = f"{self.shape.layers} of {self.full.layers} layers", 100 * value / bound
        rows = [Row(f"8x7B {self.dtype}, {layers}", metric, value, "tokens/s", bound, percent)]
        if self.shape.layers < self.full.layers:
            scaled = f"8x7B {self.dtype}, scaled from {self.shape.layers} to {self.full.layers} layers"
            rows.append(Row(scaled, metric, value * scale, "tokens/s", bound * scale, percent))
        return rows


def decode_rows(run: Run, batch: int) -> list[Row]:
    """Tokens/s of a batch against reading what its tokens need."""

    def rate() -> float:
        # The prefill gives one token.
        run.model.generate(prompts_of(batch, PROMPT), max_tokens=STEPS + 1, ignore_eos=True)
        return batch * STEPS / run.model.timings.decode_seconds

    rate()  # warms up
    value = statistics.median(rate() for _ in range(run.rounds))
    experts = experts_read(run.model, batch)
    traffic = step_bytes(run.shape, run.dtype, batch, experts)
    bound = batch * 1e9 * run.rates.bandwidth / traffic
    all_experts = round(experts * run.full.layers / run.shape.layers)
    scale = traffic / step_bytes(run.full, run.dtype, batch, all_experts)
    return run.rows(f"decode batch {batch}", value, bound, scale)


def prefill_rows(run: Run) -> list[Row]:
    """Tokens/s of one prompt; the bound is its arithmetic."""

    def rate() -> float:
        run.model.generate(prompts_of(1, PREFILL), max_tokens=1)
        return PREFILL / run.model.timings.prefill_seconds

    rate()
    value = statistics.median(rate() for _ in range(run.rounds))
    bound = 1e9 * run.rates.arithmetic * PREFILL / run.shape.prefill_flop(PREFILL)
    scale = run.shape.prefill_flop(PREFILL) / run.full.prefill_flop(PREFILL)
    return run.rows(f"prefill {PREFILL}", value, bound, scale)


def random_model(shape: Shape, dtype: str, device: str) -> mixtral.Mixtral:
    config = model_config(shape, max_position=32768)
    return mixtral.Mixtral.from_config(config, device, dtype, chunk_size=PREFILL, max_batch=max(BATCHES))


def run_model(bench: Bench, shape: Shape, full: Shape, dtype: str, rounds: int) -> None:
    """All rows of ``shape``, which is ``full`` or some of its layers."""
    print(f"drawing {shape.weights / 1e9:.1f} G {dtype} weights, {shape.layers} of {full.layers} layers", flush=True)
    model = random_model(shape, dtype, bench.device)
    run = Run(model, shape, full, rates_of(bench.device, ARITHMETIC[dtype]), rounds)
    bench.rows += prefill_rows(run)
    for batch in BATCHES:
        bench.rows += decode_rows(run, batch)
        print(f"  batch {batch}: {bench.rows[-1].value:.1f} tokens/s", flush=True)


def run(bench: Bench, most_layers: int, rounds: int) -> None:
    """Mixtral 8x7B on the GPU, no more than ``most_layers`` of it."""
    for dtype in ARITHMETIC:
        layers = min(most_layers, layers_that_fit(MIXTRAL_8X7B, torch.cuda.mem_get_info()[0], dtype))
        if layers < 1:
            raise RuntimeError("model_cuda.run: the GPU must have room for one layer of Mixtral 8x7B, got none")
        run_model(bench, replace(MIXTRAL_8X7B, layers=layers), MIXTRAL_8X7B, dtype, rounds)
        torch.cuda.empty_cache()  # the model is gone: its memory is for the next
