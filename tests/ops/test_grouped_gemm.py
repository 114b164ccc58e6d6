"""grouped_gemm against the f64 reference, its bitwise invariances and its errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import (
    DTYPES,
    assert_same_product,
    assert_within_bound,
    assert_within_tolerance,
    int8_weight,
    opcheck,
    pack,
    with_threads,
)
from error_bounds import int8_gemm_bound
from mixtral import reference
from routing import ROUTINGS, make_routing, offsets

# M, Kdim, N, E: around the sizes of lanes (16), column blocks (32), row blocks (64) and panels (512)
CASES = [
    (0, 8, 5, 2),
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (5, 16, 33, 3),
    (130, 33, 64, 2),
    (65, 513, 31, 8),
    (257, 1040, 37, 16),
]
QUANTISED = ["int8", "fp8", "int4"]
PACKED_FORMATS = [(dtype, None) for dtype in DTYPES] + [(torch.bfloat16, quantize) for quantize in QUANTISED]
# The same, for packed weights: also beyond a chunk of rows (512), and with more than 256 rows an expert, for which
# int4 has another kernel on Hopper
PACKED_CASES = [
    (0, 32, 32, 2),
    (1, 32, 32, 1),
    (5, 544, 96, 3),
    (130, 64, 288, 2),
    (65, 1056, 160, 5),
    (600, 1024, 32, 1),
    (900, 96, 544, 3),
]


def make(case: tuple, routing: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, depth, columns, experts = case
    a = torch.randn(rows, depth, device=device, dtype=torch.float64).to(dtype)
    b = torch.randn(experts, columns, depth, device=device, dtype=torch.float64).to(dtype)
    return a, b, offsets(make_routing(routing, rows, experts, 1, device), experts)


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, routing, device, dtype):
    a, b, offs = make(case, routing, device, dtype)
    for ends in (offs, offs.long()):
        assert_within_tolerance("grouped_gemm", ops.grouped_gemm(a, b, ends), a, b, offs)


@pytest.mark.every_isa
@pytest.mark.parametrize("depth", [4096, 14336])
def test_long_sums_match_reference(depth, device, dtype):
    a, b, offs = make((100, depth, 24, 2), "uniform", device, dtype)
    assert_within_tolerance("grouped_gemm", ops.grouped_gemm(a, b, offs), a, b, offs)


@pytest.mark.every_isa
@pytest.mark.parametrize("depth", [4096, 14336])
def test_rows_do_not_depend_on_batch_or_threads(depth, device, dtype):
    """The bits of a row are the same alone, in any batch, beside any neighbours and with any number of threads."""
    a, b, _ = make((128, depth, 40, 1), "uniform", device, dtype)
    whole = with_threads(2, lambda: ops.grouped_gemm(a, b, torch.tensor([128], device=device)))
    for rows in (1, 16, 33, 100, 128):
        for threads in (1, 2, 4):
            part, ends = a[-rows:].contiguous(), torch.tensor([rows], device=device)
            actual = with_threads(threads, lambda part=part, ends=ends: ops.grouped_gemm(part, b, ends))
            assert_same_product(actual, whole[-rows:])


@pytest.mark.every_isa
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_equals_plain(case, device, dtype):
    a, b, offs = make(case, "zipf", device, dtype)
    assert torch.equal(ops.grouped_gemm(a, pack(b), offs), ops.grouped_gemm(a, b, offs))


@pytest.mark.every_isa
@pytest.mark.parametrize("quantize", ["fp8", "int4"])
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_quantised_equals_what_it_stands_for(case, quantize, device):
    a, b, offs = make(case, "zipf", device, torch.bfloat16)
    packed = pack(b, quantize)
    rows = reference.round_rows_to_e4m3(a) if quantize == "fp8" else a
    expected = ops.grouped_gemm(rows, ops.unpack_weight(packed), offs)
    assert_same_product(ops.grouped_gemm(a, packed, offs), expected, float8=quantize == "fp8")


@pytest.mark.every_isa
def test_rows_that_meet_fp8_weights_are_rounded_to_e4m3():
    """Of all magnitudes; ties; zeros; NaN throughout where there is inf or NaN. The weight picks out each depth."""
    a = torch.randn(40, 64) * 2.0 ** torch.linspace(-126, 124, 40)[:, None]
    a[0], a[1], a[2, 3], a[3, 63], a[4, 0] = 0, 2.0**-133, float("nan"), float("inf"), -float("inf")
    a[5] = 2.0 ** -torch.arange(64)
    a[6, :17], a[6, 17:] = torch.arange(256, 273) / 16, 28  # neighbours and ties between them
    a = a.bfloat16()
    out = ops.grouped_gemm(a, ops.pack_weight(torch.eye(64)[None], "fp8"), torch.tensor([40]))
    expected = reference.round_rows_to_e4m3(a)
    finite = torch.ones(40, dtype=torch.bool)
    finite[2:5] = False
    assert out[~finite].isnan().all() and torch.equal(out[finite], expected[finite])
    assert not torch.equal(out[finite], a[finite])


def test_fp8_product_is_near_the_exact_one(device):
    a, b, offs = make((130, 1024, 64, 2), "uniform", device, torch.bfloat16)
    exact = reference.grouped_gemm(a.double(), b.double(), offs)
    error = ops.grouped_gemm(a, pack(b, "fp8"), offs).double() - exact
    assert 0.02 < error.square().mean().sqrt() / exact.square().mean().sqrt() < 0.05  # e4m3 errs by some 2.6 %, twice


@pytest.mark.every_isa
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_int8_is_scale_times_q(case, device):
    """On the CPU without a rounding to bf16: results are nearly always the exact ones, rounded."""
    a, b, offs = make(case, "zipf", device, torch.bfloat16)
    packed = pack(b, "int8")
    if device == "cpu":
        weight = int8_weight(packed)
        actual, oracle = ops.grouped_gemm(a, packed, offs), reference.grouped_gemm(a.double(), weight, offs)
        assert_within_bound(actual, oracle, int8_gemm_bound(a, weight, offs))
        assert (actual != oracle.bfloat16()).sum() <= 1 + 0.02 * actual.numel()  # f32 sums: rounded as exact ones are
    else:
        assert torch.equal(ops.grouped_gemm(a, packed, offs), ops.grouped_gemm(a, ops.unpack_weight(packed), offs))


@pytest.mark.every_isa
@pytest.mark.parametrize(("dtype", "quantize"), PACKED_FORMATS, ids=str)
@pytest.mark.parametrize("depth", [4096, 14336])
def test_rows_with_packed_weights_do_not_depend_on_batch_or_threads(depth, dtype, quantize, device):
    a, b, _ = make((128, depth, 32, 1), "uniform", device, dtype)  # one column block: threads split the rows
    packed, float8 = pack(b, quantize), quantize == "fp8"
    whole = with_threads(2, lambda: ops.grouped_gemm(a, packed, torch.tensor([128], device=device)))
    for rows in (1, 2, 3, 4, 5, 16, 33, 100, 128):
        for threads in (1, 2, 4):
            part, ends = a[-rows:].contiguous(), torch.tensor([rows], device=device)
            actual = with_threads(threads, lambda part=part, ends=ends: ops.grouped_gemm(part, packed, ends))
            assert_same_product(actual, whole[-rows:], float8)


@pytest.mark.every_isa
@pytest.mark.parametrize("quantize", [None, *QUANTISED])
def test_few_rows_have_the_bits_of_many(quantize):
    """Also where products and sums are subnormal, overflow or are not a number."""
    many = 70  # more than any kernel for few rows takes
    a = torch.randn(many, 544) * 2.0 ** torch.linspace(-124, 120, many)[:, None]
    a[7, 100], a[12, 100], a[20, 100] = float("inf"), float("nan"), 2.0**-130
    b = torch.randn(1, 64, 544) * 2.0 ** torch.linspace(-66, 60, 64)[:, None]
    a, packed = a.bfloat16(), ops.pack_weight(b.bfloat16(), quantize)
    whole = ops.grouped_gemm(a, packed, torch.tensor([many]))
    assert (whole == 0).any() and whole.isinf().any() and whole.isnan().any()
    for rows in (1, 2, 3, 4, 5, 8, 15, 33):
        parts = [ops.grouped_gemm(part, packed, torch.tensor([len(part)])) for part in a.split(rows)]
        assert torch.equal(torch.cat(parts).view(torch.int16), whole.view(torch.int16)), f"{rows} rows"


@pytest.mark.every_isa
@pytest.mark.parametrize("scale", [0, 1, 126, 127, 254, 255])
def test_one_row_has_the_bits_of_many_at_every_int4_scale(scale):
    """The kernel of one row multiplies sums by the power of two of a scale, the others each weight."""
    magnitudes = torch.tensor([0, 2.0**-126, 2.0**-62, 2.0**-48, 2.0**-47, 1, 2.0**55, 2.0**56, 2.0**59, 2.0**127])
    a = (torch.randn(len(magnitudes), 64) * 0.5).clamp(-1, 1) * magnitudes[:, None]
    a[:, 1::2] = -a[:, ::2]  # sums that are nearly zero
    a[:, 5] = magnitudes
    a, b = a.bfloat16(), (4 * torch.randn(1, 32, 64)).clamp(-7, 7).bfloat16() * 2.0 ** (scale // 2 - 64)
    packed = ops.pack_weight(b, "int4", torch.full((1, 32, 2), scale, dtype=torch.uint8))
    whole = ops.grouped_gemm(a, packed, torch.tensor([len(a)]))
    parts = [ops.grouped_gemm(row, packed, torch.tensor([1])) for row in a.split(1)]
    assert torch.equal(torch.cat(parts).view(torch.int16), whole.view(torch.int16))


def test_packed_inputs_may_be_strided(device):
    a, b, offs = make((9, 64, 96, 3), "uniform", device, torch.bfloat16)
    for quantize in (None, *QUANTISED):
        packed = pack(b, quantize)
        strided = packed.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        assert torch.equal(ops.grouped_gemm(a, strided, offs), ops.grouped_gemm(a, packed, offs))


def test_rows_do_not_depend_on_the_other_experts(device, dtype):
    a, b, _ = make((70, 600, 40, 3), "uniform", device, dtype)
    together = ops.grouped_gemm(a, b, torch.tensor([5, 69, 70], device=device))
    starts = [0, 5, 69, 70]
    for e in range(3):
        rows = slice(starts[e], starts[e + 1])
        alone = ops.grouped_gemm(a[rows], b[e : e + 1], torch.tensor([starts[e + 1] - starts[e]], device=device))
        assert_same_product(together[rows], alone)


@pytest.mark.parametrize("ends", [[0, 0, 9], [0, 9, 9], [9, 9, 9], [4, 4, 9]], ids=str)
def test_empty_groups(ends, device, dtype):
    a, b, _ = make((9, 20, 6, 3), "uniform", device, dtype)
    offs = torch.tensor(ends, device=device)
    assert_within_tolerance("grouped_gemm", ops.grouped_gemm(a, b, offs), a, b, offs)


def test_empty_sizes(device, dtype):
    def run(rows: int, depth: int, columns: int, experts: int) -> torch.Tensor:
        a, b = torch.ones(rows, depth, device=device, dtype=dtype), torch.ones(experts, columns, depth, device=device)
        return ops.grouped_gemm(a, b.to(dtype), torch.full((experts,), rows, device=device))

    assert run(0, 3, 4, 2).shape == (0, 4) and run(3, 4, 0, 2).shape == (3, 0) and run(0, 3, 4, 0).shape == (0, 4)
    assert torch.equal(run(3, 0, 4, 2), torch.zeros(3, 4, device=device, dtype=dtype))


def test_strided_and_unaligned_inputs(device, dtype):
    wide = torch.randn(12, 3 * 64 + 1, device=device).to(dtype)
    weights = torch.randn(2, 64, 10, device=device).to(dtype)
    offs = torch.tensor([4, 0, 12, 0], device=device)[::2]
    for a in (wide[:, 1:65], wide[:, ::3][:, :64], wide[:1, :64].expand(12, -1), wide.flatten()[1:769].view(12, 64)):
        for b in (weights.transpose(1, 2), weights[:1].transpose(1, 2).expand(2, -1, -1)):
            expected = ops.grouped_gemm(a.clone(), b.contiguous(), offs.contiguous())
            assert torch.equal(ops.grouped_gemm(a, b, offs), expected)


def test_nan_stays_in_its_group(device, dtype):
    a, b, _ = make((9, 70, 6, 3), "uniform", device, dtype)
    offs = torch.tensor([3, 6, 9], device=device)
    clean = ops.grouped_gemm(a, b, offs)
    a[4, 69] = float("nan")
    b[2, 1, 0] = float("inf")
    out = ops.grouped_gemm(a, b, offs)
    assert out[4].isnan().all() and not out[6:, 1].isfinite().any()
    rest = torch.ones_like(out, dtype=torch.bool)
    rest[4], rest[6:, 1] = False, False
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([3, 2, 4], "grouped_gemm: offs must be >= 0 and must not decrease, got 2 after 3 at expert 1"),
        ([-1, 2, 4], "grouped_gemm: offs must be >= 0 and must not decrease, got -1 after 0 at expert 0"),
        ([1, 2, 3], "grouped_gemm: offs must end at the 4 rows of a, got 3"),
        ([1, 2, 2**32 + 4], "grouped_gemm: offs must end at the 4 rows of a, got 4294967300"),
    ],
    ids=str,
)
def test_bad_offsets_raise_on_cpu_and_stay_in_bounds_on_cuda(ends, message, device):
    a, b = torch.ones(4, 2, device=device), torch.ones(3, 5, 2, device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=message):
            ops.grouped_gemm(a, b, torch.tensor(ends))
        return
    out = ops.grouped_gemm(a, b, torch.tensor(ends, device=device))
    covered = min(max(ends), 4)
    assert torch.equal(out[:covered], torch.full((covered, 5), 2.0, device=device))
    assert torch.equal(out[covered:], torch.zeros(4 - covered, 5, device=device))


A, B, OFFS = torch.ones(4, 2), torch.ones(3, 5, 2), torch.tensor([1, 2, 4])


@pytest.mark.parametrize(
    ("a", "b", "offs", "message"),
    [
        (A[0], B, OFFS, r"grouped_gemm: a must have 2 dimensions \[M, Kdim\], got shape \[2\]"),
        (A.double(), B.double(), OFFS, "grouped_gemm: a must be Float, BFloat16 or Half, got Double"),
        (A, B[0], OFFS, r"grouped_gemm: b must have 3 dimensions \[E, N, Kdim\], got shape \[5, 2\]"),
        (A, B[..., :1], OFFS, r"grouped_gemm: b must have size 2 in dimension 2, got shape \[3, 5, 1\]"),
        (A, B.half(), OFFS, "grouped_gemm: b must be Float, got Half"),
        (A, B, OFFS[None], r"grouped_gemm: offs must have 1 dimensions \[E\], got shape \[1, 3\]"),
        (A, B, OFFS[:2], r"grouped_gemm: offs must have size 3 in dimension 0, got shape \[2\]"),
        (A, B, OFFS.float(), "grouped_gemm: offs must be Int or Long, got Float"),
    ],
)
def test_bad_input_raises(a, b, offs, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_gemm(a.to(device), b.to(device), offs.to(device))


PLAIN = torch.ones(3, 64, 96)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(4, 64), PLAIN, r"grouped_gemm: b must be packed from \[3, 64, 64\], got \[3, 64, 96\]"),
        (torch.ones(4, 96).half(), PLAIN, "grouped_gemm: b must be Half, got Float"),
        (torch.ones(4, 96).half(), PLAIN.bfloat16(), "grouped_gemm: b must be Half, got BFloat16"),
    ],
)
def test_packed_weight_that_does_not_fit_raises(a, b, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_gemm(a.to(device), pack(b.to(device)), OFFS.to(device))


@pytest.mark.parametrize("quantize", QUANTISED)
def test_quantised_weight_that_does_not_fit_raises(quantize):
    packed = ops.pack_weight(PLAIN, quantize)
    with pytest.raises(RuntimeError, match=r"b must be packed from \[3, 64, 64\], got \[3, 64, 96\]"):
        ops.grouped_gemm(torch.ones(4, 64).bfloat16(), packed, OFFS)
    for dtype, name in ((torch.float32, "Float"), (torch.float16, "Half")):
        message = f"grouped_gemm: b is quantised and needs inputs of BFloat16, got {name}"
        with pytest.raises(RuntimeError, match=message):
            ops.grouped_gemm(torch.ones(4, 96, dtype=dtype), packed, OFFS)
    with pytest.raises(RuntimeError, match=r"grouped_gemm: b must have the shape of a packed weight, got \[3, "):
        ops.grouped_gemm(torch.ones(4, 96).bfloat16(), packed[..., :-1], OFFS)


@pytest.mark.parametrize("case", [(0, 8, 5, 2), (5, 16, 33, 3), (1, 3, 2, 1)], ids=str)
def test_opcheck(case, device, dtype):
    opcheck(torch.ops.mixtral.grouped_gemm.default, make(case, "uniform", device, dtype))


@pytest.mark.parametrize(("dtype", "quantize"), PACKED_FORMATS, ids=str)
def test_opcheck_of_packed_weights(dtype, quantize, device):
    a, b, offs = make((5, 64, 96, 3), "uniform", device, dtype)
    opcheck(torch.ops.mixtral.grouped_gemm.default, (a, pack(b, quantize), offs), float8=quantize == "fp8")
