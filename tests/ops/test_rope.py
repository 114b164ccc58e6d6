"""rope against the f64 reference and Hugging Face, its invariances and its errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads

SHAPES = [(0, 2, 1, 8), (1, 1, 1, 2), (3, 4, 2, 6), (5, 8, 2, 128), (33, 3, 5, 80), (2, 1, 1, 256)]
THETA = 1e6


def make(
    shape: tuple[int, int, int, int], device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, heads, kv_heads, head_dim = shape
    q = torch.randn(tokens, heads, head_dim, device=device).to(dtype)
    k = torch.randn(tokens, kv_heads, head_dim, device=device).to(dtype)
    return q, k, torch.randint(0, 40000, (tokens,), device=device)


@pytest.mark.every_isa
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("theta", [1e4, THETA])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, theta, interleaved, device, dtype):
    arguments = (*make(shape, device, dtype), theta, interleaved)
    assert_within_tolerance("rope", ops.rope(*arguments), *arguments)


@pytest.mark.parametrize("start", [2**31 - 2, 2**33 - 2], ids=["2^31", "2^33"])
def test_large_positions(start, device, dtype):
    q, k, _ = make((4, 2, 1, 64), device, dtype)
    positions = torch.arange(start, start + 4, device=device)
    assert_within_tolerance("rope", ops.rope(q, k, positions, THETA), q, k, positions, THETA)
    assert not torch.equal(ops.rope(q, k, positions, THETA)[0], ops.rope(q, k, positions - 2**31, THETA)[0])


def test_equals_hugging_face(device):
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

    q, k, positions = make((17, 4, 2, 128), device, torch.float32)
    config = MixtralConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_theta=THETA)
    cosine, sine = MixtralRotaryEmbedding(config).to(device)(q, positions[None] % 4096)
    expected = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cosine, sine)
    for actual, want in zip(ops.rope(q, k, positions % 4096, THETA), expected, strict=True):
        torch.testing.assert_close(actual, want[0].transpose(0, 1), atol=1e-5, rtol=0)


def test_interleaved_is_half_split_on_permuted_channels(device, dtype):
    q, k, positions = make((5, 4, 2, 16), device, dtype)
    to_half_split = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)]).to(device)
    halves = ops.rope(q[..., to_half_split], k[..., to_half_split], positions, THETA)
    pairs = ops.rope(q, k, positions, THETA, interleaved=True)
    for half, pair in zip(halves, pairs, strict=True):
        assert torch.equal(half, pair[..., to_half_split])


def test_position_zero_changes_nothing(device, dtype):
    q, k, positions = make((3, 2, 2, 32), device, dtype)
    for x, out in zip((q, k), ops.rope(q, k, positions * 0, THETA), strict=True):
        assert torch.equal(x, out)


def test_scores_depend_on_the_distance_alone(device):
    q, k, _ = make((2, 1, 1, 64), device, torch.float32)
    scores = []
    for start in (0, 1000):
        rotated_q, rotated_k = ops.rope(q, k, torch.tensor([start + 7, start + 3], device=device), THETA)
        scores.append((rotated_q[0] * rotated_k[1]).sum())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=0)


def test_token_does_not_depend_on_batch_threads_or_index_type(device, dtype):
    q, k, positions = make((129, 8, 2, 128), device, dtype)
    whole = with_threads(2, lambda: ops.rope(q, k, positions, THETA)[0])
    assert torch.equal(whole, with_threads(1, lambda: ops.rope(q, k, positions, THETA)[0]))
    assert torch.equal(whole, ops.rope(q, k, positions.int(), THETA)[0])
    assert torch.equal(whole[64:65], ops.rope(q[64:65], k[64:65], positions[64:65], THETA)[0])


def test_strided_inputs(device, dtype):
    packed = torch.randn(6, 4 + 2 + 2, 32, device=device).to(dtype)
    q, k, positions = packed[:, :4], packed[:, 4:6], torch.arange(12, device=device)[::2]
    expected = ops.rope(q.contiguous(), k.contiguous(), positions.contiguous(), THETA)
    for actual, want in zip(ops.rope(q, k, positions, THETA), expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 8)}, r"rope: q must have 3 dimensions \[T, Nq, D\], got shape \[3, 8\]"),
        (
            {"q": torch.ones(3, 2, 7), "k": torch.ones(3, 1, 7)},
            r"rope: q must have an even head dim, got shape \[3, 2, 7\]",
        ),
        ({"q": torch.ones(3, 2, 8).double()}, "rope: q must be Float, BFloat16 or Half, got Double"),
        ({"k": torch.ones(3, 1, 8).half()}, "rope: k must be Float, got Half"),
        ({"k": torch.ones(2, 1, 8)}, r"rope: k must have size 3 in dimension 0, got shape \[2, 1, 8\]"),
        ({"k": torch.ones(3, 1, 6)}, r"rope: k must have size 8 in dimension 2, got shape \[3, 1, 6\]"),
        ({"positions": torch.arange(4)}, r"rope: positions must have size 3 in dimension 0, got shape \[4\]"),
        ({"positions": torch.ones(3)}, "rope: positions must be Int or Long, got Float"),
        ({"theta": 0.0}, "rope: theta must be positive and finite, got 0"),
    ],
)
def test_bad_input_raises(change, message, device):
    arguments = {
        "q": torch.ones(3, 2, 8),
        "k": torch.ones(3, 1, 8),
        "positions": torch.arange(3),
        "theta": THETA,
    } | change
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.rope(**moved)


@pytest.mark.parametrize("shape", [(0, 2, 1, 8), (3, 4, 2, 6)], ids=str)
def test_opcheck(shape, device, dtype):
    opcheck(torch.ops.mixtral.rope.default, (*make(shape, device, dtype), THETA), {"interleaved": True})
