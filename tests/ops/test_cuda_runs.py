"""What only a GPU can show: the same bits at every run, graphs whose routing changes, streams, sizes beyond 32 bits."""

import pytest
import torch

import mixtral.ops as ops
from conftest import pack
from mixtral import reference
from routing import ROUTINGS, make_routing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
REPEATS = 1000
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def layer(tokens: int, quantize: str | None = None) -> tuple[torch.Tensor, ...]:
    """x, gate_up_proj, down_proj, router."""
    hidden, intermediate, experts = 256, 512, 8
    x = torch.randn(tokens, hidden, **BF16)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, **BF16) / hidden**0.5
    down = torch.randn(experts, hidden, intermediate, **BF16) / intermediate**0.5
    if quantize:
        gate_up, down = pack(gate_up, quantize), pack(down, quantize)
    return x, gate_up, down, torch.randn(experts, hidden, device="cuda") / hidden**0.5


def moe(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    return ops.moe_mlp(x, *ops.moe_route(x, router, 2), gate_up, down)


def paged(queries: list[int], keys: int, window: int) -> tuple:
    """Arguments of rolling_kv_cache_attention: so many queries of each sequence, 32 heads over 8, pages of 16."""
    batch, pages = len(queries), -(-keys // 16)
    k_cache, v_cache = torch.randn(2, batch * pages, 16, 8, 128, **BF16)
    page_table = torch.randperm(batch * pages, device="cuda").view(batch, pages)
    kv_lens = torch.cat([torch.randint(count, keys + 1, (1,), device="cuda") for count in queries])
    starts = torch.tensor([0, *queries], device="cuda").cumsum(0)
    return torch.randn(sum(queries), 32, 128, **BF16), k_cache, v_cache, page_table, starts, kv_lens, window


def decode(batch: int, keys: int, window: int) -> tuple:
    return paged([1] * batch, keys, window)


def prefill(lengths: list[int], window: int) -> tuple:
    total = sum(lengths)
    q = torch.randn(total, 8, 128, **BF16)
    k, v = torch.randn(2, total, 2, 128, **BF16)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return q, k, v, starts, starts, window


CALLS = {
    "moe decode": lambda: (moe, layer(1)),
    "moe few": lambda: (moe, layer(40)),
    "moe middle": lambda: (moe, layer(300)),
    "moe prefill": lambda: (moe, layer(2000)),
    "moe fp8 decode": lambda: (moe, layer(1, "fp8")),
    "moe fp8 prefill": lambda: (moe, layer(2000, "fp8")),
    "moe int4 decode": lambda: (moe, layer(1, "int4")),
    "moe int4 prefill": lambda: (moe, layer(2500, "int4")),
    "attention decode": lambda: (ops.rolling_kv_cache_attention, decode(3, 1000, 700)),
    "attention prefill": lambda: (ops.sliding_window_attention, prefill([700, 3, 129], 256)),
    "attention paged prefill": lambda: (ops.rolling_kv_cache_attention, paged([500, 3, 129], 900, 256)),
}


@pytest.mark.parametrize("call", CALLS)
def test_same_bits_at_every_run(call):
    op, arguments = CALLS[call]()
    first = op(*arguments)
    assert first.isfinite().all()
    differing = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(REPEATS):
        differing += (op(*arguments) != first).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("call", CALLS)
def test_on_another_stream_and_under_load(call):
    op, arguments = CALLS[call]()
    expected = op(*arguments)
    torch.cuda.synchronize()
    noise, stream = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    results = []
    with torch.cuda.stream(stream):
        for _ in range(20):
            results.append(op(*arguments))
    for _ in range(20):
        noise = noise @ noise / 2048
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


# Up to 32 tokens, with int4 up to 16, without a permutation; then by the kernels for few and for many rows.
@pytest.mark.parametrize("quantize", [None, "fp8", "int4"])
@pytest.mark.parametrize("tokens", [0, 1, 16, 32, 40, 300, 2500])
def test_graph_replay_with_changing_routing(tokens, quantize):
    x, gate_up, down, router = layer(tokens, quantize)
    weights = torch.rand(tokens, 2, device="cuda")
    ids = make_routing("uniform", tokens, 8, 2, "cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        ops.moe_mlp(x, weights, ids, gate_up, down)  # warm-up
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = ops.moe_mlp(x, weights, ids, gate_up, down)
    for replay in range(1000):
        if replay % 10 == 0:
            ids.copy_(make_routing(ROUTINGS[replay // 10 % len(ROUTINGS)], tokens, 8, 2, "cuda"))
            x.normal_()
        graph.replay()
        if replay % 10 in (0, 9):
            assert torch.equal(out, ops.moe_mlp(x, weights, ids, gate_up, down)), f"replay {replay}"


def replay_attention(arguments, lengths):
    """Attention over the cache in one graph, replayed with each of ``lengths``, against calls without a graph."""
    q, kv_lens = arguments[0], arguments[5]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.rolling_kv_cache_attention(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = ops.rolling_kv_cache_attention(*arguments)
    for of_sequences in lengths:
        kv_lens.copy_(torch.tensor(of_sequences, device="cuda"))
        q.normal_()
        graph.replay()
        assert torch.equal(out, ops.rolling_kv_cache_attention(*arguments)), f"lengths {of_sequences}"


def test_graph_replay_of_paged_prefill_with_growing_sequences():
    """Pages of 16, as the engine's: a block of keys comes from eight of them."""
    replay_attention(paged([300, 40], 1024, 512), [[length, 1324 - length] for length in range(300, 1025, 29)])


def test_graph_replay_of_decode_attention_with_growing_sequences():
    replay_attention(decode(4, 1024, 512), [[length, 1, 1024 - length, 1024] for length in range(0, 1024, 7)])


class DecodeStep:
    """Three layers of one token a sequence, as the model decodes: the ops that start while the one before ends."""

    def __init__(self, batch: int, quantize: str | None, device: str = "cuda"):
        torch.manual_seed(batch)
        bf16, long = {"device": device, "dtype": torch.bfloat16}, {"device": device, "dtype": torch.int64}
        hidden, self.heads, self.kv_heads, dim, pages = 512, 8, 2, 128, 40
        self.layers = []
        for _ in range(3):
            qkv = torch.randn(1, (self.heads + 2 * self.kv_heads) * dim, hidden, **bf16) / hidden**0.5
            o = torch.randn(1, hidden, self.heads * dim, **bf16) / (self.heads * dim) ** 0.5
            gate_up = torch.randn(8, 1024, hidden, **bf16) / hidden**0.5
            down = torch.randn(8, hidden, 512, **bf16) / 512**0.5
            if quantize:
                qkv, o, gate_up, down = (pack(weight, quantize) for weight in (qkv, o, gate_up, down))
            caches = torch.randn(2, batch * pages, 16, self.kv_heads, dim, **bf16)
            router = torch.randn(8, hidden, device=device) / hidden**0.5
            self.layers.append((torch.rand(2, hidden, **bf16), qkv, o, gate_up, down, router, *caches))
        self.x = torch.randn(batch, hidden, **bf16)
        self.offs = torch.full((1,), batch, device=device, dtype=torch.int32)
        self.page_table = torch.randperm(batch * pages, **long).view(batch, pages)
        self.starts = torch.arange(batch + 1, **long)
        self.positions = torch.randint(1, 16 * pages, (batch,), **long)

    def run(self, after_each=lambda: None) -> torch.Tensor:
        def done(result):
            after_each()
            return result

        batch, residual, x = self.x.shape[0], torch.zeros_like(self.x), self.x
        slots = self.page_table.gather(1, self.positions[:, None] // 16)[:, 0] * 16 + self.positions % 16
        kv_lens = self.positions + 1
        for norms, qkv, o, gate_up, down, router, k_cache, v_cache in self.layers:
            x, residual = done(ops.add_rms_norm(x, residual, norms[0], 1e-5))
            rows = done(ops.grouped_gemm(x, qkv, self.offs)).view(batch, -1, 128)
            q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], 1)
            q = done(ops.rolling_kv_cache_rope_write(q, k, v, self.positions, 1e6, k_cache, v_cache, slots))
            x = done(ops.rolling_kv_cache_attention(q, k_cache, v_cache, self.page_table, self.starts, kv_lens, 500))
            x = done(ops.grouped_gemm(x.view(batch, -1), o, self.offs))
            x, residual = done(ops.add_rms_norm(x, residual, norms[1], 1e-5))
            weights, ids = done(ops.moe_route(x, router, 2))
            x = done(ops.moe_mlp(x, weights, ids, gate_up, down))
        return x + residual


@pytest.mark.parametrize("quantize", [None, "fp8", "int4"])
@pytest.mark.parametrize("batch", [1, 4, 40])
def test_ops_of_a_step_that_overlap_give_the_bits_of_one_op_at_a_time(batch, quantize):
    step = DecodeStep(batch, quantize)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step.run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = step.run()
    for _ in range(200):
        step.x.normal_()
        step.positions.random_(1, 640)
        expected = step.run(torch.cuda.synchronize)
        assert torch.equal(step.run(), expected)
        graph.replay()
        assert torch.equal(out, expected)


def test_graphs_and_streams_that_attend_at_once_do_not_share_counters():
    """Launches count their blocks in memory that nobody clears: every stream and every graph has its own."""
    call, expected, graphs = decode(2, 4096, 0), [], []
    capture, streams = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(3)]
    for _ in range(2):
        graphs.append((torch.cuda.CUDAGraph(), torch.randn_like(call[0])))
    with torch.cuda.stream(capture):
        ops.rolling_kv_cache_attention(*call)  # warm-up
    torch.cuda.synchronize()
    for i, (graph, q) in enumerate(graphs):
        with torch.cuda.graph(graph, stream=capture):
            out = ops.rolling_kv_cache_attention(q, *call[1:])
        graphs[i] = (graph, out)
        expected.append(ops.rolling_kv_cache_attention(q, *call[1:]))
    alone = ops.rolling_kv_cache_attention(*call)
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, (graph, _) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            beside = ops.rolling_kv_cache_attention(*call)
        torch.cuda.synchronize()
        assert torch.equal(beside, alone)
        assert all(torch.equal(out, want) for (_, out), want in zip(graphs, expected, strict=True))


def test_bad_expert_ids_are_dropped_and_the_context_lives():
    x, gate_up, down, _ = layer(40)
    weights = torch.rand(40, 2, device="cuda")
    ids = make_routing("uniform", 40, 8, 2, "cuda")
    ids[0, 0], ids[1, 1], ids[39, 0], ids[5, 1] = -1, 8, 2**31 - 1, -(2**31)
    kept = weights.clone()
    kept[0, 0] = kept[1, 1] = kept[39, 0] = kept[5, 1] = 0
    expected = ops.moe_mlp(x, kept, ids.clamp(0, 7), gate_up, down)
    torch.testing.assert_close(ops.moe_mlp(x, weights, ids, gate_up, down), expected)


@pytest.mark.parametrize("lengths", [[3, 2], [700, 130]], ids=["few queries", "many queries"])
def test_bad_sequence_starts_are_not_followed_and_the_context_lives(lengths):
    q, k, v, starts, _, window = prefill(lengths, 0)
    first = slice(0, lengths[0])
    expected = ops.sliding_window_attention(q, k, v, starts, starts, window)[first]
    for wrong in (10**6, 2**40, -(10**6)):
        bad = starts.clone()
        bad[2] = wrong
        assert torch.equal(ops.sliding_window_attention(q, k, v, bad, starts, window)[first], expected)


@pytest.mark.parametrize("rows", [2**31 // 14336 + 200, 2**32 // 14336 + 200])
def test_sizes_beyond_32_bits(rows):
    """More than 2^31 and 2^32 values in one tensor: the last rows are right."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of device memory")
    hidden, intermediate, experts = 256, 14336, 2
    x = torch.randn(rows, hidden, **BF16)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, **BF16) / 16
    down = torch.randn(experts, hidden, intermediate, **BF16) / 120
    ids = (torch.arange(rows, device="cuda") % experts).int()[:, None]
    weights = torch.ones(rows, 1, device="cuda")
    out = ops.moe_mlp(x, weights, ids, gate_up, down)
    for part in (slice(0, 64), slice(rows - 64, rows)):
        alone = ops.moe_mlp(x[part], weights[part], ids[part], gate_up, down)
        oracle = reference.moe_mlp(x[part].double(), weights[part].double(), ids[part], gate_up.double(), down.double())
        torch.testing.assert_close(out[part].double(), oracle, atol=0.02, rtol=0.02)
        torch.testing.assert_close(alone.double(), oracle, atol=0.02, rtol=0.02)
