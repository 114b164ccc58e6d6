"""The ops of the rolling cache: against the f64 reference, against full keys kept for ever."""

import random
from collections.abc import Iterable

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads
from mixtral import reference

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit on the CPU; on CUDA the order of a sum may depend on the shape of the batch."""
    if actual.device.type == "cpu":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected)


class Pool:
    """A pool of NaN-filled pages, and for every sequence all the keys it ever had."""

    def __init__(
        self, device, dtype, window: int, chunk: int, page_size: int, sequences: int, columns: int | None = None
    ):
        self.device, self.dtype, self.window, self.page_size = device, dtype, window, page_size
        self.columns = columns or -(-(window - 1 + chunk) // page_size) + 1
        shape = (sequences * self.columns + 1, page_size, KV_HEADS, HEAD_DIM)
        self.k_cache, self.v_cache = torch.full((2, *shape), float("nan"), device=device, dtype=dtype)
        self.free = random.Random(0).sample(range(shape[0]), shape[0])
        self.table: list[dict[int, int]] = [
            {} for _ in range(sequences)
        ]  # page number of the sequence -> page of the pool
        self.q = [self.rows(0, HEADS) for _ in range(sequences)]
        self.k = [self.rows(0, KV_HEADS) for _ in range(sequences)]
        self.v = [self.rows(0, KV_HEADS) for _ in range(sequences)]

    def rows(self, count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, HEAD_DIM, device=self.device).to(self.dtype)

    def length(self, b: int) -> int:
        return len(self.k[b])

    def release(self, b: int, first_position: int) -> None:
        """Give back the pages wholly before `first_position`, poisoned."""
        for number in [n for n in self.table[b] if (n + 1) * self.page_size <= first_position]:
            page = self.table[b].pop(number)
            self.k_cache[page] = self.v_cache[page] = float("nan")
            self.free.append(page)

    def evict(self, b: int) -> None:
        self.release(b, self.length(b) + self.page_size)
        self.q[b], self.k[b], self.v[b] = self.rows(0, HEADS), self.rows(0, KV_HEADS), self.rows(0, KV_HEADS)

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """Append counts[b] tokens to each sequence b in one write and one attention call; returns each one's output."""
        slots = []
        for b, count in counts.items():
            begin = self.length(b)
            if self.window:
                self.release(b, begin - self.window + 1)
            for position in range(begin, begin + count):
                number = position // self.page_size
                if number not in self.table[b]:
                    self.table[b][number] = self.free.pop()
                slots.append(self.table[b][number] * self.page_size + position % self.page_size)
            self.q[b] = torch.cat([self.q[b], self.rows(count, HEADS)])
            self.k[b] = torch.cat([self.k[b], self.rows(count, KV_HEADS)])
            self.v[b] = torch.cat([self.v[b], self.rows(count, KV_HEADS)])
        q, k, v = (torch.cat([x[b][len(x[b]) - n :] for b, n in counts.items()]) for x in (self.q, self.k, self.v))
        ops.rolling_kv_cache_write(
            self.k_cache, self.v_cache, k, v, torch.tensor(slots, dtype=torch.long, device=self.device)
        )
        out = ops.rolling_kv_cache_attention(q, self.k_cache, self.v_cache, *self.index(counts), self.window)
        return dict(zip(counts, out.split(list(counts.values())), strict=True))

    def index(self, counts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """page_table, with -1 where there is no page; cu_seqlens_q; kv_lens."""
        page_table = torch.full((len(counts), self.columns), -1, device=self.device)
        for row, b in enumerate(counts):
            for number, page in self.table[b].items():
                page_table[row, number % self.columns] = page
        cu_seqlens = torch.tensor([0, *counts.values()], device=self.device).cumsum(0)
        return page_table, cu_seqlens, torch.tensor([self.length(b) for b in counts], device=self.device)

    def all_keys(self, b: int, count: int) -> tuple:
        """Arguments of sliding_window_attention for the last `count` tokens of b over all its keys."""
        cu_q = torch.tensor([0, count], device=self.device)
        cu_k = torch.tensor([0, self.length(b)], device=self.device)
        return self.q[b][self.length(b) - count :], self.k[b], self.v[b], cu_q, cu_k, self.window


def run(pool: Pool, program: Iterable[dict[int, int]]) -> None:
    """Every step equals attention over all keys, and both are within the tolerance."""
    for counts in program:
        for b, out in pool.step(counts).items():
            assert out.isfinite().all()
            assert_same(out, ops.sliding_window_attention(*pool.all_keys(b, counts[b])))
            assert_within_tolerance("sliding_window_attention", out, *pool.all_keys(b, counts[b]))


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("window", [0, 1, 5, 16])
def test_matches_reference(window, page_size, device, dtype):
    pool = Pool(device, dtype, window, 40, page_size, 3, columns=60)
    pool.step({0: 17, 1: 40, 2: 3})
    counts = {2: 9, 0: 1, 1: 0}
    pool.step(counts)
    q = pool.rows(10, HEADS)
    arguments = (pool.k_cache, pool.v_cache, *pool.index(counts), window)
    actual = ops.rolling_kv_cache_attention(q, *arguments)
    assert_within_tolerance("rolling_kv_cache_attention", actual, q, *arguments)


def test_write_matches_reference(device, dtype):
    k_cache, v_cache = torch.randn(2, 5, 4, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    k, v = torch.randn(2, 7, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    slots = torch.tensor([19, 0, 7, 3, 12, 4, 8], device=device)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    reference.rolling_kv_cache_write(expected_k, expected_v, k, v, slots)
    ops.rolling_kv_cache_write(k_cache, v_cache, k, v, slots)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)


def test_strided_tokens_and_index_types(device, dtype):
    packed = torch.randn(6, 2 * KV_HEADS, HEAD_DIM, device=device).to(dtype)
    k, v, slots = packed[:, :KV_HEADS], packed[:, KV_HEADS:], torch.arange(12, device=device)[::2]
    caches = [torch.zeros(2, 3, 4, KV_HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2)]
    ops.rolling_kv_cache_write(*caches[0], k, v, slots)
    ops.rolling_kv_cache_write(*caches[1], k.contiguous(), v.contiguous(), slots.int())
    assert torch.equal(*caches) and caches[0].any()
    q = torch.randn(4, HEADS * 2, HEAD_DIM, device=device).to(dtype)[:, ::2]
    index = [torch.tensor(x, device=device) for x in ([[0, 1, 2]], [0, 4], [11])]
    expected = ops.rolling_kv_cache_attention(q.contiguous(), *caches[0], *index, 3)
    assert torch.equal(ops.rolling_kv_cache_attention(q, *caches[0], *(x.int() for x in index), 3), expected)


# ---- bugs seen in other systems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 4, 16])
def test_decode_across_the_wrap_sees_exactly_the_last_window_keys(window, device, dtype):
    """Off by one at the wrap; wrong update when the length reaches the window; window or window + 1 keys."""
    run(Pool(device, dtype, window, 1, 4, 1), [{0: 1}] * (5 * window + 3))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 16])
def test_prompt_longer_than_the_window_does_not_leak_the_future(window, device, dtype):
    for length in (window - 1, window, window + 1, 2 * window - 1, 2 * window, 2 * window + 1, 5 * window + 3):
        run(Pool(device, dtype, window, length, 4, 1), [{0: length}, {0: 1}])


def test_second_chunk_longer_than_the_window_has_no_empty_row(device, dtype):
    run(Pool(device, dtype, 4, 13, 3, 1), [{0: 13}, {0: 13}, {0: 13}])


def test_before_the_window_is_full_nothing_unwritten_is_seen(device, dtype):
    """Unwritten rows hold NaN: one that is attended to, even with weight zero, shows."""
    run(Pool(device, dtype, 16, 1, 4, 1), [{0: 1}] * 15)


def test_memory_per_sequence_does_not_grow_past_the_window(device):
    pool = Pool(device, torch.float32, 8, 3, 4, 1)
    run(pool, [{0: 3}] * 40)
    assert len(pool.table[0]) <= pool.columns == 4


@pytest.mark.every_isa
@pytest.mark.parametrize("stale", [float("nan"), float("inf"), 1e30])
def test_stale_rows_have_no_effect(stale, device, dtype):
    pool = Pool(device, dtype, 6, 5, 4, 2)
    pool.step({0: 5, 1: 2})
    counts = {0: 5, 1: 1}
    pool.step(counts)
    index, q = pool.index(counts), pool.rows(6, HEADS)
    clean = ops.rolling_kv_cache_attention(q, pool.k_cache, pool.v_cache, *index, 6)
    unseen = torch.ones(pool.k_cache.shape[:2], dtype=torch.bool, device=device)
    for b, positions in ((0, range(0, 10)), (1, range(0, 3))):
        for position in positions:
            if position // 4 in pool.table[b]:
                unseen[pool.table[b][position // 4], position % 4] = False
    pool.k_cache[unseen] = pool.v_cache[unseen] = stale
    assert torch.equal(ops.rolling_kv_cache_attention(q, pool.k_cache, pool.v_cache, *index, 6), clean)
    assert clean.isfinite().all()


def test_xformers_BlockDiagonalCausalWithOffsetPaddedKeysMask(device, dtype):
    """Decode of sequences of unequal length in one call."""
    run(Pool(device, dtype, 0, 64, 16, 3, columns=8), [{0: 5, 1: 64, 2: 17}, {0: 1, 1: 1, 2: 1}, {2: 1, 0: 1}])


# ---- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.every_isa
@pytest.mark.parametrize("window", [0, 5, 16])
def test_chunked_equals_whole(window, device, dtype):
    length, w = 57, window or 16
    for chunk in sorted({1, 3, w - 1, w, w + 1}):
        counts = [min(chunk, length - begin) for begin in range(0, length, chunk)]
        pool = Pool(device, dtype, window, chunk, 4, 1, columns=None if window else 20)
        parts = torch.cat([pool.step({0: count})[0] for count in counts])
        assert_same(parts, ops.sliding_window_attention(*pool.all_keys(0, length)))


@pytest.mark.every_isa
def test_decode_over_many_keys_in_pages(dtype):
    run(Pool("cpu", dtype, 1300, 1600, 48, 2), [{0: 1600, 1: 1400}, {0: 1, 1: 1}, {1: 1}])


@pytest.mark.every_isa
@pytest.mark.parametrize("seed", range(12))
def test_random_programs_equal_keys_kept_for_ever(seed, device):
    """Prefill, decode, eviction and reuse of pages, with pages and windows of odd sizes."""
    rng = random.Random(seed)
    window, chunk, page_size = rng.choice([1, 2, 7, 16, 33]), rng.choice([1, 4, 21]), rng.choice([1, 3, 8, 16])
    pool = Pool(device, torch.float32, window, chunk, page_size, 4)

    def program():
        for _ in range(40):
            if rng.random() < 0.15:
                pool.evict(rng.randrange(4))
            yield {b: rng.choice([0, 1, 1, rng.randint(1, chunk)]) for b in rng.sample(range(4), rng.randint(1, 4))}

    run(pool, program())


@pytest.mark.parametrize("start", [2**31 - 5, 2**33 - 5], ids=["2^31", "2^33"])
@pytest.mark.parametrize("window", [4, 7])
def test_large_positions(window, start, device, dtype):
    """A cache whose first key in sight sits near 2^31 or 2^33 gives what the same cache gives at 32 + start % 32."""
    page_size, columns = 4, 8  # positions that agree modulo 32 share a row of the buffer and a place in their key block
    k_cache, v_cache = torch.randn(2, columns, page_size, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    q, table = torch.randn(6, HEADS, HEAD_DIM, device=device).to(dtype), torch.randperm(columns, device=device)[None]
    cu = torch.tensor([0, 6], device=device)
    near, far = (torch.tensor([s + 8], device=device) for s in (32 + start % 32, start))
    expected = ops.rolling_kv_cache_attention(q, k_cache, v_cache, table, cu, near, window)
    assert torch.equal(ops.rolling_kv_cache_attention(q, k_cache, v_cache, table, cu, far, window), expected)


def test_does_not_depend_on_threads(dtype):
    pool = Pool("cpu", dtype, 9, 30, 4, 4)
    counts = {b: 30 for b in range(4)}
    pool.step(counts)
    q, index = pool.rows(120, HEADS), pool.index(counts)
    one, two = (
        with_threads(n, lambda: ops.rolling_kv_cache_attention(q, pool.k_cache, pool.v_cache, *index, 9))
        for n in (1, 2)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("counts", [{}, {0: 0}, {0: 0, 1: 3, 2: 0}], ids=str)
def test_empty(counts, device, dtype):
    pool = Pool(device, dtype, 3, 3, 4, 3)
    if counts:
        run(pool, [counts])
    else:
        cu, none = torch.tensor([0], device=device), torch.empty(0, dtype=torch.long, device=device)
        out = ops.rolling_kv_cache_attention(pool.rows(0, HEADS), pool.k_cache, pool.v_cache, none.view(0, 2), cu, none)
        assert out.shape == (0, HEADS, HEAD_DIM)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, -1, 2], r"slot_mapping must lie in \[0, 12\), got -1 at token 1"),
        ([0, 1, 12], r"slot_mapping must lie in \[0, 12\), got 12 at token 2"),
        ([2**40, 1, 2], r"slot_mapping must lie in \[0, 12\), got 1099511627776 at token 0"),
        ([5, 1, 5], "slot_mapping must name every slot once, got 5 twice"),
    ],
)
def test_bad_slot_raises_on_cpu_before_any_write(slots, message, dtype):
    k_cache, v_cache = torch.zeros(2, 3, 4, KV_HEADS, HEAD_DIM, dtype=dtype)
    rows = torch.ones(3, KV_HEADS, HEAD_DIM, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"rolling_kv_cache_write: {message}"):
        ops.rolling_kv_cache_write(k_cache, v_cache, rows, rows, torch.tensor(slots))
    assert not k_cache.any() and not v_cache.any()


def test_bad_slot_never_reaches_memory(device):
    """An error on the CPU, dropped on CUDA."""
    k_cache, v_cache = torch.zeros(2, 3, 4, KV_HEADS, HEAD_DIM, device=device)
    rows, slots = torch.ones(3, KV_HEADS, HEAD_DIM, device=device), torch.tensor([-1, 5, 12], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="slot_mapping must lie in"):
            ops.rolling_kv_cache_write(k_cache, v_cache, rows, rows, slots)
    else:
        ops.rolling_kv_cache_write(k_cache, v_cache, rows, rows, slots)
    written = [] if device == "cpu" else [5]
    for cache in (k_cache, v_cache):
        assert cache.flatten(0, 1).any(-1).any(-1).nonzero().flatten().tolist() == written


CACHE = torch.zeros(3, 4, 2, 8)
WRITE = {
    "k_cache": CACHE,
    "v_cache": CACHE.clone(),
    "k": torch.ones(2, 2, 8),
    "v": torch.ones(2, 2, 8),
    "slot_mapping": torch.arange(2),
}
ATTEND = {
    "q": torch.ones(2, 4, 8),
    "k_cache": CACHE,
    "v_cache": CACHE.clone(),
    "page_table": torch.tensor([[0, 1], [2, -1]]),
    "cu_seqlens_q": torch.tensor([0, 1, 2]),
    "kv_lens": torch.tensor([7, 3]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cache": CACHE[0]}, r"k_cache must have 4 dimensions \[pages, P, Nkv, D\], got shape \[4, 2, 8\]"),
        (
            {"k_cache": CACHE.transpose(1, 2)},
            r"k_cache must be contiguous, got shape \[3, 2, 4, 8\] with other strides",
        ),
        ({"v_cache": CACHE[:2]}, r"v_cache must have size 3 in dimension 0, got shape \[2, 4, 2, 8\]"),
        ({"v_cache": CACHE.half()}, "v_cache must be Float, got Half"),
        ({"k": torch.ones(2, 2, 8).half()}, "k must be Float, got Half"),
        ({"k": torch.ones(2, 1, 8)}, r"k must have size 2 in dimension 1, got shape \[2, 1, 8\]"),
        ({"v": torch.ones(3, 2, 8)}, r"v must have size 2 in dimension 0, got shape \[3, 2, 8\]"),
        ({"slot_mapping": torch.ones(2)}, "slot_mapping must be Int or Long, got Float"),
    ],
)
def test_bad_write_raises(change, message, device):
    with pytest.raises(RuntimeError, match=f"rolling_kv_cache_write: {message}"):
        ops.rolling_kv_cache_write(**{name: x.to(device) for name, x in (WRITE | change).items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 8)}, r"q must have a multiple of the 2 key/value heads, got shape \[2, 3, 8\]"),
        ({"k_cache": CACHE.transpose(1, 2)}, "k_cache must be contiguous"),
        ({"page_table": torch.zeros(3, 2).long()}, r"cu_seqlens_q must have size 4 in dimension 0, got shape \[3\]"),
        ({"page_table": torch.zeros(2, 0).long()}, r"page_table must have at least 1 column, got shape \[2, 0\]"),
        ({"kv_lens": torch.ones(3).long()}, r"kv_lens must have size 2 in dimension 0, got shape \[3\]"),
        ({"window": -2}, r"window must be >= 0 \(0: no window\), got -2"),
    ],
)
def test_bad_attention_raises(change, message, device):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (ATTEND | change).items()}
    with pytest.raises(RuntimeError, match=f"rolling_kv_cache_attention: {message}"):
        ops.rolling_kv_cache_attention(**moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 1, 3])}, "cu_seqlens_q must end at 2, got 3"),
        ({"kv_lens": torch.tensor([7, 0])}, r"kv_lens must count the queries of the call \(1 in sequence 1\), got 0"),
        (
            {"kv_lens": torch.tensor([7, 5])},
            r"page_table must lie in \[0, 3\) for the keys that sequence 1 sees, got -1",
        ),
        (
            {"kv_lens": torch.tensor([9, 3])},
            "page_table must have at least 3 columns for the keys that sequence 0 sees, got 2",
        ),
    ],
)
def test_bad_index_raises_on_cpu(change, message):
    ops.rolling_kv_cache_attention(**ATTEND)
    with pytest.raises(RuntimeError, match=f"rolling_kv_cache_attention: {message}"):
        ops.rolling_kv_cache_attention(**(ATTEND | change))


def test_backward_is_an_error_in_words(device):
    moved = {name: x.to(device) for name, x in ATTEND.items()}
    moved["q"] = moved["q"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="rolling_kv_cache_attention: has no backward"):
        ops.rolling_kv_cache_attention(**moved).sum().backward()


def test_opcheck(device, dtype):
    moved = {name: x.to(device) for name, x in (WRITE | ATTEND).items()}
    floats = {name: x.to(dtype) if x.is_floating_point() else x for name, x in moved.items()}
    opcheck(torch.ops.mixtral.rolling_kv_cache_write.default, tuple(floats[name] for name in WRITE))
    opcheck(torch.ops.mixtral.rolling_kv_cache_attention.default, tuple(floats[name] for name in ATTEND), {"window": 4})
