"""rolling_kv_cache_rope_write: rope and the write to the cache in one pass."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_bound, opcheck
from error_bounds import rope_bound
from mixtral import reference

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def rope_write_arguments(device, dtype, tokens: int = 7) -> dict[str, torch.Tensor | float]:
    """q, k and v are slices of one projection, with NaN in a column that none of them has."""
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS + 1, HEAD_DIM, device=device).to(dtype)
    qkv[:, -1] = float("nan")
    q, k, v, _ = qkv.split([HEADS, KV_HEADS, KV_HEADS, 1], dim=1)
    positions = torch.randint(0, 40000, (tokens,), device=device)
    caches = torch.full((2, 5, 4, KV_HEADS, HEAD_DIM), float("nan"), device=device, dtype=dtype)
    slots = torch.tensor([19, 0, 7, 3, 12, 4, 8], device=device)[:tokens]
    names = ("q", "k", "v", "positions", "theta", "k_cache", "v_cache", "slot_mapping")
    return dict(zip(names, (q, k, v, positions, 1e4, *caches, slots), strict=True))


def rope_then_write(q, k, v, positions, theta, k_cache, v_cache, slot_mapping) -> torch.Tensor:
    q, k = ops.rope(q.contiguous(), k.contiguous(), positions, theta)
    ops.rolling_kv_cache_write(k_cache, v_cache, k, v.contiguous(), slot_mapping)
    return q


def with_own_caches(arguments: dict) -> dict:
    return arguments | {name: arguments[name].clone() for name in ("k_cache", "v_cache")}


@pytest.mark.every_isa
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("layout", ["slices", "contiguous", "heads_apart", "dims_apart"])
def test_rope_write_equals_rope_then_write(layout, tokens, device, dtype):
    arguments = rope_write_arguments(device, dtype, tokens)
    lay_out = {
        "slices": lambda x: x,
        "contiguous": torch.Tensor.contiguous,
        "heads_apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "dims_apart": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    }[layout]
    arguments |= {name: lay_out(arguments[name]) for name in ("q", "k", "v")}
    expected = with_own_caches(arguments)
    q = rope_then_write(**expected)
    assert torch.equal(ops.rolling_kv_cache_rope_write(**arguments), q) and q.isfinite().all()
    for name in ("k_cache", "v_cache"):
        actual, want = (
            arguments[name].nan_to_num(77.0),
            expected[name].nan_to_num(77.0),
        )  # unwritten rows still hold NaN
        assert torch.equal(actual, want) and int((actual != 77.0).sum()) == tokens * KV_HEADS * HEAD_DIM


def test_rope_write_matches_reference(device, dtype):
    arguments = rope_write_arguments(device, dtype)
    oracle = {n: x.double() if n not in ("positions", "theta", "slot_mapping") else x for n, x in arguments.items()}
    plain, slots = with_own_caches(arguments), arguments["slot_mapping"]
    want, plain_q = reference.rolling_kv_cache_rope_write(**oracle), reference.rolling_kv_cache_rope_write(**plain)
    q_bound, k_bound = rope_bound(*(arguments[name] for name in ("q", "k", "positions", "theta")))
    assert_within_bound(ops.rolling_kv_cache_rope_write(**arguments), want, q_bound, lambda: plain_q)
    keys, wanted_keys, plain_keys = (x["k_cache"].flatten(0, 1)[slots] for x in (arguments, oracle, plain))
    assert_within_bound(keys, wanted_keys, k_bound, lambda: plain_keys)
    assert torch.equal(arguments["v_cache"].nan_to_num(77.0), plain["v_cache"].nan_to_num(77.0))


def test_rope_write_keeps_nan_in_its_token(device, dtype):
    arguments = rope_write_arguments(device, dtype)
    expected = with_own_caches(arguments)
    clean = ops.rolling_kv_cache_rope_write(**expected)
    arguments["q"][2] = arguments["k"][2] = arguments["v"][2] = float("nan")
    q = ops.rolling_kv_cache_rope_write(**arguments)
    others = [0, 1, 3, 4, 5, 6]
    assert q[2].isnan().all() and torch.equal(q[others], clean[others])
    slots = arguments["slot_mapping"]
    for name in ("k_cache", "v_cache"):
        actual, want = (x[name].flatten(0, 1) for x in (arguments, expected))
        assert actual[slots[2]].isnan().all() and torch.equal(actual[slots[others]], want[slots[others]])


def test_rope_write_takes_int32_and_strided_indices(device, dtype):
    arguments = rope_write_arguments(device, dtype)
    expected = with_own_caches(arguments)
    q = ops.rolling_kv_cache_rope_write(**expected)
    positions, slots = arguments["positions"], arguments["slot_mapping"]
    for index in (
        (positions.int(), slots.int()),
        (positions.repeat_interleave(2)[::2], slots.repeat_interleave(2)[::2]),
    ):
        again = with_own_caches(arguments) | dict(zip(("positions", "slot_mapping"), index, strict=True))
        assert torch.equal(ops.rolling_kv_cache_rope_write(**again), q)
        assert torch.equal(again["k_cache"].nan_to_num(77.0), expected["k_cache"].nan_to_num(77.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(7, 2, 8)}, r"k must have size 16 in dimension 2, got shape \[7, 2, 8\]"),
        ({"v": torch.ones(6, 2, 16)}, r"v must have size 7 in dimension 0, got shape \[6, 2, 16\]"),
        ({"v": torch.ones(7, 2, 16).half()}, "v must be Float, got Half"),
        ({"positions": torch.ones(7)}, "positions must be Int or Long, got Float"),
        ({"theta": 0.0}, "theta must be positive and finite, got 0"),
        ({"k_cache": torch.ones(5, 4, 3, 16)}, r"v_cache must have size 3 in dimension 2, got shape \[5, 4, 2, 16\]"),
        ({"slot_mapping": torch.arange(6)}, r"k must have size 6 in dimension 0, got shape \[7, 2, 16\]"),
    ],
)
def test_bad_rope_write_raises(change, message, device):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(RuntimeError, match=f"rolling_kv_cache_rope_write: {message}"):
        ops.rolling_kv_cache_rope_write(**rope_write_arguments(device, torch.float32) | moved)


@pytest.mark.parametrize("bad", [-1, 20, 2**40])
def test_rope_write_never_writes_to_a_bad_slot(bad, device, dtype):
    """An error on the CPU before any write, dropped on CUDA."""
    arguments = rope_write_arguments(device, dtype)
    arguments["slot_mapping"][3] = bad
    if device == "cpu":
        with pytest.raises(RuntimeError, match=rf"slot_mapping must lie in \[0, 20\), got {bad} at token 3"):
            ops.rolling_kv_cache_rope_write(**arguments)
    else:
        q = ops.rope(arguments["q"], arguments["k"], arguments["positions"], arguments["theta"])[0]
        assert torch.equal(ops.rolling_kv_cache_rope_write(**arguments), q)
    written = [] if device == "cpu" else [0, 4, 7, 8, 12, 19]
    for name in ("k_cache", "v_cache"):
        rows = arguments[name].flatten(0, 1).isfinite().all(-1).all(-1)
        assert rows.nonzero().flatten().tolist() == written


def test_opcheck(device, dtype):
    arguments = rope_write_arguments(device, dtype)
    for name in ("k_cache", "v_cache"):
        arguments[name].zero_()
    opcheck(torch.ops.mixtral.rolling_kv_cache_rope_write.default, tuple(arguments.values()))
