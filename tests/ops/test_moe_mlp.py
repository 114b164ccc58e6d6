"""moe_mlp against the f64 reference and, bit for bit, against the ops it is made of."""

import resource

import pytest
import torch

import mixtral.ops as ops
from conftest import DTYPES, assert_same_product, assert_within_tolerance, opcheck, pack, with_threads
from mixtral import reference
from routing import ROUTINGS, make_routing

# T, H, I, E, K
CASES = [
    (0, 8, 8, 4, 2),
    (1, 1, 1, 1, 1),
    (3, 5, 7, 2, 2),
    (17, 40, 33, 3, 1),
    (5, 64, 96, 8, 2),
    (32, 40, 72, 3, 2),
    (65, 64, 96, 8, 2),
    (33, 100, 31, 16, 4),
]
PACKED_CASES = [(0, 32, 32, 4, 2), (1, 32, 32, 1, 1), (16, 64, 96, 8, 2), (40, 544, 96, 8, 2), (130, 64, 160, 3, 1)]
PACKED_CASES += [(330, 64, 96, 2, 2)]  # more than 256 rows an expert
# Formats of gate_up_proj and down_proj
PACKED_FORMATS = [(dtype, None, None) for dtype in DTYPES]
QUANTISED = [("int8", "int8"), ("fp8", "fp8"), ("fp8", "int8"), ("int4", "int4"), ("int4", None)]
PACKED_FORMATS += [(torch.bfloat16, *formats) for formats in QUANTISED]
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(case: tuple, routing: str, device: str, dtype: torch.dtype) -> Layer:
    tokens, hidden, intermediate, experts, top_k = case

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64)

    return (
        random(tokens, hidden).to(dtype),
        torch.rand(tokens, top_k, device=device),
        make_routing(routing, tokens, experts, top_k, device),
        (random(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype),
        (random(experts, hidden, intermediate) / intermediate**0.5).to(dtype),
    )


def composed(*layer: torch.Tensor, multiply=ops.grouped_gemm) -> torch.Tensor:
    x, weights, ids, gate_up, down = layer
    permuted, offs, row_map = ops.moe_permute(x, ids, len(gate_up))
    y = multiply(ops.swiglu(multiply(permuted, gate_up, offs)), down, offs)
    return ops.moe_unpermute(y, weights, row_map)


def multiply_unpacked(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """grouped_gemm with what ``b`` stands for."""
    if b.dtype == torch.float8_e4m3fn:
        a = reference.round_rows_to_e4m3(a)
    packed = b.dim() == 4 or b.dtype != a.dtype
    return ops.grouped_gemm(a, ops.unpack_weight(b) if packed else b, offs)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, routing, device, dtype):
    layer = make(case, routing, device, dtype)
    assert_within_tolerance("moe_mlp", ops.moe_mlp(*layer), *layer)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", [*CASES, (40, 600, 520, 8, 2)], ids=str)
def test_equals_the_composition_of_the_ops(case, routing, device, dtype):
    layer = make(case, routing, device, dtype)
    assert_same_product(ops.moe_mlp(*layer), composed(*layer))
    x, weights, ids, gate_up, down = layer
    assert torch.equal(ops.moe_mlp(x, weights, ids.long(), gate_up, down), ops.moe_mlp(*layer))


@pytest.mark.every_isa
@pytest.mark.parametrize(("dtype", "gate_up_format", "down_format"), PACKED_FORMATS, ids=str)
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_weights_equal_what_they_stand_for(case, dtype, gate_up_format, down_format, device):
    x, weights, ids, gate_up, down = make(case, "zipf", device, dtype)
    gate_up, down = pack(gate_up, gate_up_format), pack(down, down_format)
    float8 = "fp8" in (gate_up_format, down_format)
    assert_same_product(ops.moe_mlp(x, weights, ids, gate_up, down), composed(x, weights, ids, gate_up, down), float8)
    if "int8" in (gate_up_format, down_format) and device == "cpu":
        return  # its scale meets the sum: test_grouped_gemm.py
    plain = ops.unpack_weight(gate_up), ops.unpack_weight(down)
    for weight_pair in ((gate_up, down), (gate_up, plain[1]), (plain[0], down)):
        layer = (x, weights, ids, *weight_pair)
        expected = composed(*layer, multiply=multiply_unpacked)
        actual = ops.moe_mlp(*layer)
        assert_same_product(composed(*layer), actual, float8)
        assert_same_product(actual, expected, float8)


@pytest.mark.parametrize(("dtype", "gate_up_format", "down_format"), PACKED_FORMATS, ids=str)
def test_token_with_packed_weights_does_not_depend_on_batch_or_threads(dtype, gate_up_format, down_format, device):
    x, weights, ids, gate_up, down = make((130, 608, 544, 8, 2), "zipf", device, dtype)
    packed = pack(gate_up, gate_up_format), pack(down, down_format)
    whole = with_threads(2, lambda: ops.moe_mlp(x, weights, ids, *packed))
    assert torch.equal(whole, with_threads(1, lambda: ops.moe_mlp(x, weights, ids, *packed)))
    for part in (slice(0, 1), slice(64, 65), slice(1, 17), slice(30, 130)):
        alone = ops.moe_mlp(x[part], weights[part], ids[part], *packed)
        assert_same_product(whole[part], alone, float8="fp8" in (gate_up_format, down_format))


def test_token_does_not_depend_on_batch_or_threads(device, dtype):
    x, weights, ids, gate_up, down = make((130, 600, 520, 8, 2), "zipf", device, dtype)
    whole = with_threads(2, lambda: ops.moe_mlp(x, weights, ids, gate_up, down))
    assert torch.equal(whole, with_threads(1, lambda: ops.moe_mlp(x, weights, ids, gate_up, down)))
    for part in (slice(0, 1), slice(64, 65), slice(1, 17), slice(30, 130)):
        assert_same_product(whole[part], ops.moe_mlp(x[part], weights[part], ids[part], gate_up, down))


def test_strided_inputs(device, dtype):
    x, weights, ids, gate_up, down = make((9, 20, 24, 4, 2), "uniform", device, dtype)
    strided = [tensor.mT.contiguous().mT for tensor in (x, weights, ids, gate_up, down)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(ops.moe_mlp(*strided), ops.moe_mlp(x, weights, ids, gate_up, down))


def test_nan_stays_in_its_token(device, dtype):
    layer = make((9, 20, 24, 4, 2), "uniform", device, dtype)
    clean = ops.moe_mlp(*layer)
    layer[0][3, 7] = float("nan")
    out = ops.moe_mlp(*layer)
    assert out[3].isnan().all()
    rest = torch.arange(9, device=device) != 3
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_tokens_may_have_different_numbers_of_experts(tokens, device, dtype):
    """The choices of expert -1 change no bit of what the others give."""
    x, weights, ids, gate_up, down = make((tokens, 64, 64, 8, 4), "uniform", device, dtype)
    count = torch.arange(tokens, device=device) % 5  # of experts of each token, none included
    dropped = torch.arange(4, device=device) >= count[:, None]
    for projections in ((gate_up, down), (pack(gate_up, None), pack(down, None))):
        mixed = ops.moe_mlp(x, weights.masked_fill(dropped, float("nan")), ids.masked_fill(dropped, -1), *projections)
        for k in range(5):
            rows = count == k
            alone = ops.moe_mlp(x[rows], weights[rows, :k], ids[rows, :k], *projections)
            assert_same_product(mixed[rows], alone)


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31), 2**32 + 1])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_bad_id_is_an_error_on_cpu_and_dropped_on_cuda(tokens, bad, device, dtype):
    x, weights, ids, gate_up, down = make((tokens, 24, 32, 4, 2), "uniform", device, dtype)
    token = min(3, tokens - 1)
    kept = weights.clone()
    kept[token, 1] = 0
    clean = ops.moe_mlp(x, kept, ids, gate_up, down)
    ids = ids.long()
    ids[token, 1] = bad
    if device == "cpu":
        expected = rf"moe_mlp: topk_ids must be in \[0, 4\), or -1 for none, got {bad} at token {token}"
        with pytest.raises(RuntimeError, match=expected):
            ops.moe_mlp(x, weights, ids, gate_up, down)
    else:
        assert_same_product(ops.moe_mlp(x, weights, ids, gate_up, down), clean)
        ids.fill_(bad)
        assert not ops.moe_mlp(x, weights, ids, gate_up, down).any()


X, W, IDS = torch.ones(2, 3), torch.ones(2, 1), torch.zeros(2, 1).int()
GATE_UP, DOWN = torch.ones(4, 10, 3), torch.ones(4, 3, 5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", X[0], r"moe_mlp: x must have 2 dimensions \[T, H\], got shape \[3\]"),
        ("x", X.double(), "moe_mlp: x must be Float, BFloat16 or Half, got Double"),
        ("topk_weights", W[0], r"moe_mlp: topk_weights must have 2 dimensions \[T, K\], got shape \[1\]"),
        ("topk_weights", W.half(), "moe_mlp: topk_weights must be Float, got Half"),
        ("topk_weights", W[:1], r"moe_mlp: topk_weights must have size 2 in dimension 0, got shape \[1, 1\]"),
        ("topk_weights", W.expand(2, 2), r"moe_mlp: topk_weights must have size 1 in dimension 1, got shape \[2, 2\]"),
        ("topk_ids", IDS[0], r"moe_mlp: topk_ids must have 2 dimensions \[T, K\], got shape \[1\]"),
        ("topk_ids", IDS.float(), "moe_mlp: topk_ids must be Int or Long, got Float"),
        ("topk_ids", IDS[:1], r"moe_mlp: topk_ids must have size 2 in dimension 0, got shape \[1, 1\]"),
        ("gate_up_proj", GATE_UP[0], r"moe_mlp: gate_up_proj must have 3 dimensions \[E, 2I, H\], got shape \[10, 3\]"),
        ("gate_up_proj", GATE_UP.half(), "moe_mlp: gate_up_proj must be Float, got Half"),
        ("gate_up_proj", GATE_UP[..., :2], r"gate_up_proj must have size 3 in dimension 2, got shape \[4, 10, 2\]"),
        ("gate_up_proj", GATE_UP[:, :9], r"gate_up_proj must have an even size in dimension 1, got shape \[4, 9, 3\]"),
        ("gate_up_proj", GATE_UP[:0], r"moe_mlp: gate_up_proj must have at least one expert, got shape \[0, 10, 3\]"),
        ("down_proj", DOWN[0], r"moe_mlp: down_proj must have 3 dimensions \[E, H, I\], got shape \[3, 5\]"),
        ("down_proj", DOWN.half(), "moe_mlp: down_proj must be Float, got Half"),
        ("down_proj", DOWN[:3], r"moe_mlp: down_proj must have size 4 in dimension 0, got shape \[3, 3, 5\]"),
        ("down_proj", DOWN[:, :2], r"moe_mlp: down_proj must have size 3 in dimension 1, got shape \[4, 2, 5\]"),
        ("down_proj", DOWN[..., :4], r"moe_mlp: down_proj must have size 5 in dimension 2, got shape \[4, 3, 4\]"),
    ],
)
def test_bad_input_raises(name, value, message, device):
    arguments = {"x": X, "topk_weights": W, "topk_ids": IDS, "gate_up_proj": GATE_UP, "down_proj": DOWN} | {name: value}
    with pytest.raises(RuntimeError, match=message):
        ops.moe_mlp(**{key: tensor.to(device) for key, tensor in arguments.items()})


BF16, GATE_UP_32, DOWN_32 = torch.ones(2, 32).bfloat16(), torch.ones(4, 64, 32), torch.ones(4, 32, 32)


@pytest.mark.parametrize(
    ("x", "gate_up", "down", "message"),
    [
        (BF16.float(), "int8", None, "moe_mlp: gate_up_proj is quantised and needs inputs of BFloat16, got Float"),
        (BF16.float(), "fp8", None, "moe_mlp: gate_up_proj is quantised and needs inputs of BFloat16, got Float"),
        (BF16.float(), None, "int4", "moe_mlp: down_proj is quantised and needs inputs of BFloat16, got Float"),
        (BF16.half(), None, None, "moe_mlp: gate_up_proj must be Half, got Float"),
        (torch.ones(2, 64), None, None, r"gate_up_proj must be packed from \[4, 64, 64\], got \[4, 64, 32\]"),
    ],
)
def test_packed_weights_that_do_not_fit_raise(x, gate_up, down, message, device):
    layer = (x, W, IDS, ops.pack_weight(GATE_UP_32, gate_up), ops.pack_weight(DOWN_32, down))
    with pytest.raises(RuntimeError, match=message):
        ops.moe_mlp(*(tensor.to(device) for tensor in layer))


@pytest.mark.parametrize(
    ("gate_up", "down", "message"),
    [
        (GATE_UP_32, DOWN_32[:3], r"down_proj must have size 4 in dimension 0, got shape \[3, 1, 1, 1024\]"),
        (GATE_UP_32, torch.ones(4, 32, 64), r"down_proj must be packed from \[4, 32, 32\], got \[4, 32, 64\]"),
        (GATE_UP_32, torch.ones(4, 64, 32), r"down_proj must be packed from \[4, 32, 32\], got \[4, 64, 32\]"),
        (GATE_UP_32[:, :32], DOWN_32, "packed from an intermediate size that is a multiple of 32, got 16"),
    ],
)
def test_packed_weights_that_do_not_fit_each_other_raise(gate_up, down, message, device):
    layer = (BF16.float(), W, IDS, ops.pack_weight(gate_up), ops.pack_weight(down))
    with pytest.raises(RuntimeError, match="moe_mlp: .*" + message):
        ops.moe_mlp(*(tensor.to(device) for tensor in layer))


@pytest.mark.parametrize("case", [(0, 8, 8, 4, 2), (5, 16, 9, 3, 2)], ids=str)
def test_opcheck(case, device, dtype):
    opcheck(torch.ops.mixtral.moe_mlp.default, make(case, "uniform", device, dtype))


@pytest.mark.parametrize(("dtype", "gate_up_format", "down_format"), PACKED_FORMATS, ids=str)
def test_opcheck_of_packed_weights(dtype, gate_up_format, down_format, device):
    x, weights, ids, gate_up, down = make((5, 32, 32, 3, 2), "uniform", device, dtype)
    packed = pack(gate_up, gate_up_format), pack(down, down_format)
    float8 = "fp8" in (gate_up_format, down_format)
    opcheck(torch.ops.mixtral.moe_mlp.default, (x, weights, ids, *packed), float8=float8)


def test_calls_after_the_first_map_no_memory():
    """Large blocks come from the system page by page, with a fault for each; what a thread keeps has none."""
    layer = make((2048, 32, 8192, 2, 2), "uniform", "cpu", torch.bfloat16)  # 64 MiB between the two products

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ops.moe_mlp(*layer)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    counts = [faults() for _ in range(10)]
    assert sum(counts[2:]) * resource.getpagesize() < 8 * 2**20, counts


def test_results_outlive_the_next_call():
    """Only what lies between the products is kept in memory of the thread."""
    first, second = (make((5, 32, 64, 4, 2), "uniform", "cpu", torch.bfloat16) for _ in range(2))
    out = ops.moe_mlp(*first)
    copy = out.clone()
    ops.moe_mlp(*second)
    assert torch.equal(out, copy)
