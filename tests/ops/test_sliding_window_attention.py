"""sliding_window_attention against the dense f64 reference, the masks by their xformers names, invariances, errors."""

import math

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads

WINDOWS = [0, 1, 2, 3, 4, 16]


def starts(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def make(
    lengths_q: list[int],
    lengths_k: list[int],
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
):
    """q, k, v, cu_seqlens_q, cu_seqlens_k of random packed sequences."""
    q = torch.randn(sum(lengths_q), heads[0], head_dim, device=device).to(dtype)
    k, v = torch.randn(2, sum(lengths_k), heads[1], head_dim, device=device).to(dtype)
    return q, k, v, starts(lengths_q, device), starts(lengths_k, device)


def assert_matches_reference(q, k, v, cu_q, cu_k, *options) -> torch.Tensor:
    actual = ops.sliding_window_attention(q, k, v, cu_q, cu_k, *options)
    assert_within_tolerance("sliding_window_attention", actual, q, k, v, cu_q, cu_k, *options)
    return actual


@pytest.mark.every_isa
@pytest.mark.parametrize("window", WINDOWS)
def test_prompts_around_multiples_of_the_window(window, device, dtype):
    w = window or 16
    lengths = [w - 1, w, w + 1, 2 * w - 1, 2 * w, 2 * w + 1, 5 * w + 3]
    assert_matches_reference(*make(lengths, lengths, device, dtype), window)


@pytest.mark.parametrize("window", WINDOWS)
def test_query_sees_exactly_the_last_window_keys(window, device):
    """With equal scores the output is the mean of the values in sight: one value per key counts them."""
    length = 50
    q, k = torch.zeros(length, 1, 1, device=device), torch.zeros(length, 1, 1, device=device)
    v = torch.arange(1.0, length + 1, device=device).square().view(length, 1, 1)
    cu = starts([length], device)
    out = ops.sliding_window_attention(q, k, v, cu, cu, window).flatten()
    expected = torch.stack([v.flatten()[max(0, i + 1 - (window or length)) : i + 1].mean() for i in range(length)])
    torch.testing.assert_close(out, expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2), (32, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 128, 160, 256])
def test_head_counts_and_head_dims(heads, head_dim, device, dtype):
    assert_matches_reference(*make([5, 1, 19], [9, 40, 19], device, dtype, heads, head_dim), 11)


@pytest.mark.every_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 13])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_query_does_not_depend_on_queries_beside_it(group, head_dim, dtype):
    q, k, v, cu_q, cu_k = make([9], [150], "cpu", dtype, (2 * group, 2), head_dim)
    whole = ops.sliding_window_attention(q, k, v, cu_q, cu_k, 70)
    for i in range(9):
        until = 150 - 8 + i  # the keys that query i may see
        lengths = starts([1], "cpu"), starts([until], "cpu")
        assert torch.equal(ops.sliding_window_attention(q[i : i + 1], k[:until], v[:until], *lengths, 70)[0], whole[i])


@pytest.mark.every_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("window", [0, 2001])
def test_one_query_over_many_keys_equals_the_same_beside_another(group, head_dim, window, dtype):
    """Threads share the keys of such a query, block by block, and their heads where a sequence has more queries."""
    lengths = [2500, 700, 3000]
    q, k, v, _, cu_k = make([2, 0, 2], lengths, "cpu", dtype, (2 * group, 2), head_dim)
    k[1] = 40 * q[1].view(2, group, head_dim).mean(1)  # the maximum of the scores rises early, once, and not again
    expected = ops.sliding_window_attention(q, k, v, starts([2, 0, 2], "cpu"), cu_k, window)[1::2]
    options = q[1::2], k, v, starts([1, 0, 1], "cpu"), cu_k, window
    for threads in (1, 3):
        assert torch.equal(with_threads(threads, lambda: ops.sliding_window_attention(*options)), expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_one_query_over_many_keys_never_reads_values_that_it_does_not_see(value, dtype):
    q, k, v, cu_q, cu_k = make([1], [3000], "cpu", dtype)
    expected = ops.sliding_window_attention(q, k, v, cu_q, cu_k, 1500)
    k[:1500] = v[:1500] = value
    assert torch.equal(ops.sliding_window_attention(q, k, v, cu_q, cu_k, 1500), expected)


@pytest.mark.every_isa
@pytest.mark.parametrize(("window", "causal"), [(0, True), (100, True), (0, False)])
def test_many_tiles_of_queries_and_blocks_of_keys(window, causal, device, dtype):
    assert_matches_reference(*make([70, 200], [300, 200], device, dtype, (8, 2), 64), window, causal)


def test_scale(device, dtype):
    assert_matches_reference(*make([20], [20], device, dtype), 0, True, 0.5)
    problem = make([20], [20], device, dtype)
    default = ops.sliding_window_attention(*problem)
    assert torch.equal(default, ops.sliding_window_attention(*problem, scale=1 / math.sqrt(16)))


def test_scores_of_any_size(device):
    """The running maximum keeps exp in range whatever the order of large and small scores."""
    q, k, v, cu_q, cu_k = make([70], [70], device, torch.float32)
    assert_matches_reference(q * 100, k * torch.linspace(-5, 5, 70, device=device).view(-1, 1, 1), v, cu_q, cu_k)


# ---- the masks people know from xformers ----------------------------------------------------------------------------


def test_xformers_BlockDiagonalCausalMask(device, dtype):
    lengths = [3, 17, 1, 40]
    out = assert_matches_reference(*make(lengths, lengths, device, dtype))
    assert out.shape[0] == sum(lengths)


def test_xformers_BlockDiagonalMask(device, dtype):
    assert_matches_reference(*make([3, 17, 1, 5], [8, 2, 33, 5], device, dtype), 0, False)


def test_xformers_BlockDiagonalCausalWithOffsetPaddedKeysMask(device, dtype):
    """Decode: one query per sequence at the end of keys of unequal length; see also test_rolling_kv_cache.py."""
    assert_matches_reference(*make([1, 1, 1], [5, 64, 17], device, dtype))


def test_sequences_do_not_see_each_other(device):
    lengths = [9, 20, 4]
    q, k, v, cu_q, cu_k = make(lengths, lengths, device, torch.float32)
    clean = ops.sliding_window_attention(q, k, v, cu_q, cu_k, 5)
    k[9:29] = v[9:29] = float("nan")
    out = ops.sliding_window_attention(q, k, v, cu_q, cu_k, 5)
    assert torch.equal(out[:9], clean[:9]) and torch.equal(out[29:], clean[29:])
    assert out[9:29].isnan().all()


# ---- bugs seen in other systems -------------------------------------------------------------------------------------


def test_future_never_leaks_into_a_prompt_longer_than_the_window(device, dtype):
    q, k, v, cu, _ = make([37], [37], device, dtype)
    clean = ops.sliding_window_attention(q, k, v, cu, cu, 4)
    k[20:] = v[20:] = float("nan")
    assert torch.equal(ops.sliding_window_attention(q, k, v, cu, cu, 4)[:20], clean[:20])


def test_keys_behind_the_window_have_no_effect(device, dtype):
    q, k, v, cu, _ = make([37], [37], device, dtype)
    clean = ops.sliding_window_attention(q, k, v, cu, cu, 4)
    k[:20] = v[:20] = float("nan")
    assert torch.equal(ops.sliding_window_attention(q, k, v, cu, cu, 4)[23:], clean[23:])


def test_second_chunk_longer_than_the_window_has_no_empty_row(device, dtype):
    out = assert_matches_reference(*make([20], [33], device, dtype), 4)
    assert out.isfinite().all() and (out != 0).any(-1).all()


@pytest.mark.every_isa
def test_query_without_keys_gives_zeros(device, dtype):
    out = assert_matches_reference(*make([10, 3], [4, 0], device, dtype), 3)
    assert (out[:6] == 0).all() and (out[10:] == 0).all() and (out[6:10] != 0).any(-1).all()
    assert (ops.sliding_window_attention(*make([3], [0], device, dtype), 0, False) == 0).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("window", [0, 20, 90])
def test_one_value_reaches_only_the_queries_that_see_it(window, value, device, dtype):
    """Whatever the place of its key in a block; beside them, other queries keep their bits."""
    q, k, v, cu, _ = make([150], [150], device, dtype, (4, 2), 40)
    clean = ops.sliding_window_attention(q, k, v, cu, cu, window)
    for position in (0, 31, 63, 64, 100, 149):
        spoilt = v.clone()
        spoilt[position, 0, 7] = value
        out = ops.sliding_window_attention(q, k, spoilt, cu, cu, window)
        seeing = slice(position, position + (window or 150))
        assert not out[seeing, :2, 7].isfinite().any()
        out[seeing, :2, 7] = clean[seeing, :2, 7]
        assert torch.equal(out, clean)


@pytest.mark.every_isa
def test_heads_do_not_see_each_other(device, dtype):
    """Rows of a head dim that fills no panel lie next to another head's numbers."""
    q, k, v, cu, _ = make([30], [30], device, dtype, (4, 2), 33)
    clean = ops.sliding_window_attention(q, k, v, cu, cu)
    q[:, 2:] = k[:, 1] = v[:, 1] = float("nan")
    assert torch.equal(ops.sliding_window_attention(q, k, v, cu, cu)[:, :2], clean[:, :2])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [0, 5, 0]], ids=str)
def test_empty(lengths, device, dtype):
    assert_matches_reference(*make(lengths, lengths, device, dtype), 3)


# ---- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.every_isa
@pytest.mark.parametrize("window", [0, 1, 5, 16])
def test_chunked_equals_whole(window, device, dtype):
    """Bit for bit on the CPU, where key blocks are aligned to absolute positions."""
    length, w = 57, window or 16
    q, k, v, cu, _ = make([length], [length], device, dtype)
    whole = ops.sliding_window_attention(q, k, v, cu, cu, window)
    for chunk in sorted({1, 3, max(1, w - 1), w, w + 1}):
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            part = ops.sliding_window_attention(
                q[begin:end], k[:end], v[:end], starts([end - begin], device), starts([end], device), window
            )
            if device == "cpu":
                assert torch.equal(part, whole[begin:end])
            else:
                torch.testing.assert_close(part, whole[begin:end])


@pytest.mark.every_isa
@pytest.mark.parametrize("window", [0, 65, 130])
def test_rows_of_a_long_prompt_do_not_depend_on_chunks(window, dtype):
    """Over several tiles of queries and blocks of keys, down to one query at a time."""
    length = 330
    q, k, v, cu, _ = make([length], [length], "cpu", dtype, (8, 2), 64)
    whole = ops.sliding_window_attention(q, k, v, cu, cu, window)
    for begin, end in [(0, 1), (0, 50), (50, 51), (63, 66), (100, 300), (127, 128), (192, 330), (329, 330)]:
        part = ops.sliding_window_attention(
            q[begin:end], k[:end], v[:end], starts([end - begin], "cpu"), starts([end], "cpu"), window
        )
        assert torch.equal(part, whole[begin:end]), f"queries {begin} to {end}"


@pytest.mark.every_isa
@pytest.mark.parametrize("causal", [True, False])
def test_sequence_does_not_depend_on_neighbours_or_threads(causal, dtype):
    lengths = [70, 1, 33, 129]
    q, k, v, cu, _ = make(lengths, lengths, "cpu", dtype, (8, 2), 64)
    whole = with_threads(2, lambda: ops.sliding_window_attention(q, k, v, cu, cu, 0, causal))
    assert torch.equal(whole, with_threads(1, lambda: ops.sliding_window_attention(q, k, v, cu, cu, 0, causal)))
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        own = starts([end - begin], "cpu")
        alone = ops.sliding_window_attention(q[begin:end], k[begin:end], v[begin:end], own, own, 0, causal)
        assert torch.equal(alone, whole[begin:end])


def test_strided_inputs_and_index_types(device, dtype):
    packed = torch.randn(21, 4 + 2 + 2, 16, device=device).to(dtype)
    q, k, v, cu = packed[:, :4], packed[:, 4:6], packed[:, 6:], starts([21], device)
    expected = ops.sliding_window_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, 6)
    assert torch.equal(ops.sliding_window_attention(q, k, v, cu.int(), cu, 6), expected)
    strided = torch.stack([cu, cu], 1)[:, 0]
    assert torch.equal(ops.sliding_window_attention(q, k, v, strided, cu.int(), 6), expected)


def test_window_larger_than_any_sequence_is_no_window(device, dtype):
    problem = make([40], [40], device, dtype)
    assert torch.equal(ops.sliding_window_attention(*problem), ops.sliding_window_attention(*problem, 2**63 - 1))


# ---- errors ---------------------------------------------------------------------------------------------------------

OP = "sliding_window_attention"
GOOD = {
    "q": torch.ones(3, 4, 8),
    "k": torch.ones(5, 2, 8),
    "v": torch.ones(5, 2, 8),
    "cu_seqlens_q": torch.tensor([0, 3]),
    "cu_seqlens_k": torch.tensor([0, 5]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 8)}, r"q must have 3 dimensions \[T, Nq, D\], got shape \[3, 8\]"),
        ({"q": torch.ones(3, 3, 8)}, r"q must have a multiple of the 2 key/value heads, got shape \[3, 3, 8\]"),
        ({"q": torch.ones(3, 4, 8).double()}, "q must be Float, BFloat16 or Half, got Double"),
        ({"k": torch.ones(5, 2, 9)}, r"k must have size 8 in dimension 2, got shape \[5, 2, 9\]"),
        ({"k": torch.ones(5, 2, 8).half()}, "k must be Float, got Half"),
        ({"k": torch.ones(5, 8)}, r"k must have 3 dimensions \[Tk, Nkv, D\], got shape \[5, 8\]"),
        ({"v": torch.ones(4, 2, 8)}, r"v must have size 5 in dimension 0, got shape \[4, 2, 8\]"),
        ({"v": torch.ones(5, 2, 8).half()}, "v must be Float, got Half"),
        ({"cu_seqlens_q": torch.tensor([0.0, 3.0])}, "cu_seqlens_q must be Int or Long, got Float"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 5])}, r"cu_seqlens_k must have size 2 in dimension 0, got shape \[3\]"),
        (
            {"cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])},
            r"cu_seqlens_q must (end at 3, got 0|have at least 2 elements, got shape \[1\])",  # CPU, CUDA
        ),
        ({"window": -1}, r"window must be >= 0 \(0: no window\), got -1"),
        ({"window": 4, "causal": False}, "window must be 0 when causal is false, got 4"),
    ],
)
def test_bad_input_raises(change, message, device):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (GOOD | change).items()}
    with pytest.raises(RuntimeError, match=f"{OP}: {message}"):
        ops.sliding_window_attention(**moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([1, 3])}, "cu_seqlens_q must start at 0, got 1"),
        ({"cu_seqlens_q": torch.tensor([0, 2])}, "cu_seqlens_q must end at 3, got 2"),
        ({"cu_seqlens_k": torch.tensor([0, 6])}, "cu_seqlens_k must end at 5, got 6"),
        (
            {"cu_seqlens_q": torch.tensor([0, 4, 3]), "cu_seqlens_k": torch.tensor([0, 5, 5])},
            "cu_seqlens_q must never fall, got 3 after 4",
        ),
    ],
)
def test_bad_cu_seqlens_raise_on_cpu(change, message):
    with pytest.raises(RuntimeError, match=f"{OP}: {message}"):
        ops.sliding_window_attention(**(GOOD | change))


@pytest.mark.parametrize("lengths", [[], [3, 0, 9]], ids=str)
def test_opcheck(lengths, device, dtype):
    problem = make(lengths, lengths, device, dtype)
    opcheck(torch.ops.mixtral.sliding_window_attention.default, problem, {"window": 4, "scale": 0.3})
    opcheck(torch.ops.mixtral.sliding_window_attention.default, problem, {"causal": False})
