"""pack_weight and unpack_weight: every byte of every format, what a quantised weight stands for, and the errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import opcheck, with_threads
from mixtral import reference

E4M3 = torch.float8_e4m3fn
FORMATS = [None, "int8", "fp8", "int4"]
SHAPES = [(1, 32, 32), (3, 96, 160), (2, 32, 1056), (5, 160, 32)]  # E, N, Kdim
EMPTY = [(0, 32, 32), (2, 0, 32), (2, 32, 0)]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def special_rows(dtype: torch.dtype) -> torch.Tensor:
    """[1, 32, 64]: random rows, but for zeros, one huge value, extremes of both signs, ties and tiny values."""
    weight = make((1, 32, 64), dtype)
    weight[0, 0] = 0
    weight[0, 1, :32] = 0
    weight[0, 2, 40] = 60000
    weight[0, 3, 7] = -60000
    weight[0, 4, 8], weight[0, 4, 9] = -5, 5
    weight[0, 5, 8], weight[0, 5, 9] = 5, -5
    weight[0, 6] = max(torch.finfo(dtype).tiny, 2.0**-100)
    weight[0, 7] = 2.0**-14 * weight[0, 8]
    weight[0, 9] = torch.arange(64).to(dtype) - 32.0
    weight[0, 10] = (weight[0, 10].double() * 2.0**-124).to(dtype)
    return weight


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.every_isa
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, quantize, dtype):
    weight = make(shape, dtype)
    packed = ops.pack_weight(weight, quantize)
    assert_same_bits(packed, reference.pack_weight(weight, quantize))
    assert_same_bits(ops.unpack_weight(packed), reference.unpack_weight(packed))


@pytest.mark.every_isa
@pytest.mark.parametrize("quantize", FORMATS)
def test_special_rows_equal_reference(quantize, dtype):
    weight = special_rows(dtype)
    packed = ops.pack_weight(weight, quantize)
    assert_same_bits(packed, reference.pack_weight(weight, quantize))
    assert_same_bits(ops.unpack_weight(packed), reference.unpack_weight(packed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_the_weight_back(shape, dtype):
    weight = make(shape, dtype)
    weight[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    assert_same_bits(ops.unpack_weight(ops.pack_weight(weight)), weight)


def test_int8_error_is_half_a_step(dtype):
    weight = torch.cat((special_rows(dtype), make((1, 64, 64), dtype)), 1)
    scales = (weight.double().abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
    stands_for = ops.unpack_weight(ops.pack_weight(weight, "int8")).double()
    rounding = stands_for.abs() * torch.finfo(torch.bfloat16).eps / 2
    assert ((stands_for - weight.double()).abs() <= 0.5001 * scales + rounding).all()


def test_fp8_error_is_half_a_step_of_e4m3(dtype):
    """Of 3 bits of mantissa, 2^-4 of a weight, and of the scale's 2^-9 below its 2^-6."""
    weight = torch.cat((special_rows(dtype), make((1, 64, 64), dtype)), 1).double()
    packed = ops.pack_weight(weight.to(dtype), "fp8")
    scales = packed[..., -128:].contiguous().view(torch.float32).double().reshape(1, -1, 1)
    assert (torch.frexp(scales).mantissa == 0.5).all() and (scales >= 2.0**-117).all()
    largest = weight.abs().amax(-1, keepdim=True) / scales
    assert (largest <= 448).all() and ((largest > 224) | (scales == 2.0**-117)).all()
    step = torch.maximum(weight.abs() * 2.0**-4, scales * 2.0**-10)
    assert ((ops.unpack_weight(packed).double() - weight).abs() <= step).all()


@pytest.mark.every_isa
def test_every_e4m3_value_is_kept_and_ties_go_to_even(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    for scale in (1.0, 2.0**-3, 2.0**5):
        for row in (values, middles):
            weight = torch.zeros(1, 32, 256)
            weight[0, :, : len(row)] = row
            weight[0, :, 255] = 448  # so that this is the scale
            actual = ops.unpack_weight(ops.pack_weight((weight * scale).to(dtype), "fp8")).float() / scale
            even = (weight * scale).to(dtype).float().div(scale).to(E4M3).float()
            assert torch.equal(actual, even) and (row is not values or torch.equal(actual, weight))


def test_fp8_scale_changes_where_the_largest_value_passes_448():
    for largest, scale in ((448, 1), (450, 2), (896, 2), (900, 4), (225, 1), (224, 0.5)):
        packed = ops.pack_weight(torch.full((1, 32, 32), float(largest)).bfloat16(), "fp8")
        assert (packed[..., -128:].contiguous().view(torch.float32) == scale).all(), largest


def test_fp8_rows_lie_as_they_are():
    weight = torch.randint(-8, 9, (1, 32, 64)).float()  # e4m3 values at any scale
    packed = ops.pack_weight(weight, "fp8")
    scales = packed[..., -128:].contiguous().view(torch.float32).view(32, 1)
    assert torch.equal(packed[0, 0, :-128].float().view(32, 64) * scales, weight[0])


def test_int4_error_is_that_of_a_scale_that_covers_all_or_less(dtype):
    """A scale that reaches the largest of 32 is at most sqrt(2) above largest / 7.5, and errs by half of itself."""
    weight = torch.cat((special_rows(dtype), make((1, 64, 64), dtype)), 1)
    groups = weight.double().unflatten(-1, (-1, 32))
    half_scale = 2**0.5 * groups.abs().amax(-1) / 7.5 / 2 + 2.0**-65
    stands_for = ops.unpack_weight(ops.pack_weight(weight, "int4")).double().unflatten(-1, (-1, 32))
    rounding = stands_for.abs() * torch.finfo(torch.bfloat16).eps / 2
    errors = ((stands_for - groups).abs() - rounding).clamp(min=0)
    assert (errors.square().sum(-1) <= 32 * half_scale.square()).all()
    assert (errors.square().sum(-1) < 12 * half_scale.square()).double().mean() > 0.9  # uniform errors: 32 / 3


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_with_given_scales_equals_reference(shape, dtype):
    weight = make(shape, dtype)
    scales = torch.randint(110, 140, (*shape[:2], shape[2] // 32), dtype=torch.uint8)
    packed = ops.pack_weight(weight, "int4", scales)
    assert_same_bits(packed, reference.pack_weight(weight, "int4", scales))
    assert_same_bits(ops.pack_weight(weight, "int4", scales.mT.contiguous().mT), packed)
    # What it stands for comes back at its own scales, which a search would not find for small levels.
    stands_for = ops.unpack_weight(packed)
    assert_same_bits(ops.pack_weight(stands_for, "int4", scales), packed)


@pytest.mark.every_isa
def test_int4_scales_that_are_almost_equally_good_equal_reference():
    """At twice the scale these 32 values have the same error. With f32 sums it is not certain which one is smaller."""
    group = torch.full((32,), 5.5625)
    group[0], group[1] = 10.625, 5.5
    weight = group + torch.zeros(1, 64, 32)
    weight[0, :, 2] += torch.arange(-32, 32) * 2.0**-18  # 3e-6 of the error each
    packed = ops.pack_weight(weight, "int4")
    assert_same_bits(packed, reference.pack_weight(weight, "int4"))
    scales = packed[0, :, 0, :32].flatten()
    assert scales[0] == scales[31] == scales[63] + 2  # the larger scale, and half of it


def test_int4_levels_at_a_scale_of_one():
    levels = torch.arange(-7.5, 8, 1).repeat(2).expand(1, 32, 32)
    for scale in (1.0, 2.0**-20, 2.0**40):
        assert torch.equal(ops.unpack_weight(ops.pack_weight(levels * scale, "int4")).float(), levels * scale)


@pytest.mark.parametrize("quantize", FORMATS)
def test_zero_rows_stay_zero(quantize, dtype):
    stands_for = ops.unpack_weight(ops.pack_weight(torch.zeros(2, 64, 64, dtype=dtype), quantize))
    assert stands_for.abs().max() == (2.0**-65 if quantize == "int4" else 0)  # int4 has no zero


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, quantize, device, dtype):
    weight = make(shape, dtype)
    packed = ops.pack_weight(weight, quantize)
    blocks = (shape[0], shape[1] // 32)
    expected = {
        None: (shape[2] // 32, 1024),
        "int8": (32 * shape[2] + 128,),
        "fp8": (32 * shape[2] + 128,),
        "int4": (shape[2] // 32, 544),
    }
    assert packed.shape == blocks + expected[quantize] and ops.unpack_weight(packed.to(device)).shape == shape


@pytest.mark.parametrize("quantize", FORMATS)
def test_strided_inputs_and_threads(quantize, dtype):
    weight = make((4, 192, 128), dtype)
    expected = with_threads(1, lambda: ops.pack_weight(weight, quantize))
    assert_same_bits(with_threads(2, lambda: ops.pack_weight(weight, quantize)), expected)
    assert_same_bits(ops.pack_weight(weight.mT.contiguous().mT, quantize), expected)
    assert_same_bits(ops.pack_weight(weight[::2, 64:], quantize), ops.pack_weight(weight[::2, 64:].clone(), quantize))
    strided = expected.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert_same_bits(ops.unpack_weight(strided), ops.unpack_weight(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**66])
@pytest.mark.parametrize("quantize", ["int8", "fp8", "int4"])
def test_weights_that_are_not_finite_cannot_be_quantised(quantize, value, dtype):
    weight = make((2, 64, 96), dtype)
    weight[1, 40, 95] = value
    with pytest.raises(
        RuntimeError, match=r"pack_weight: weight must be below 2\^66 in magnitude to be quantised, got"
    ):
        ops.pack_weight(weight, quantize)


WEIGHT = torch.ones(2, 32, 64)


@pytest.mark.parametrize(
    ("weight", "quantize", "message"),
    [
        (WEIGHT[0], None, r"pack_weight: weight must have 3 dimensions \[E, N, Kdim\], got shape \[32, 64\]"),
        (WEIGHT.double(), None, "pack_weight: weight must be Float, BFloat16 or Half, got Double"),
        (WEIGHT.char(), "int8", "pack_weight: weight must be Float, BFloat16 or Half, got Char"),
        (WEIGHT[:, :31], None, r"weight must have N and Kdim that are multiples of 32, got shape \[2, 31, 64\]"),
        (WEIGHT[..., :48], "int4", r"weight must have N and Kdim that are multiples of 32, got shape \[2, 32, 48\]"),
        (WEIGHT, "int2", 'pack_weight: quantize must be None, "int8", "fp8" or "int4", got "int2"'),
        (WEIGHT, "", 'pack_weight: quantize must be None, "int8", "fp8" or "int4", got ""'),
    ],
)
def test_bad_weight_raises(weight, quantize, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pack_weight(weight, quantize)


SCALES = torch.full((2, 32, 2), 128, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("quantize", "scales", "message"),
    [
        ("int8", SCALES, 'pack_weight: scales must come with quantize "int4", got "int8"'),
        ("fp8", SCALES, 'pack_weight: scales must come with quantize "int4", got "fp8"'),
        (None, SCALES, 'pack_weight: scales must come with quantize "int4", got None'),
        ("int4", SCALES.float(), "pack_weight: scales must be Byte, got Float"),
        ("int4", SCALES[0], r"pack_weight: scales must have 3 dimensions \[E, N, Kdim/32\], got shape \[32, 2\]"),
        ("int4", SCALES[:1], "pack_weight: scales must have size 2 in dimension 0"),
        ("int4", SCALES[:, :31], "pack_weight: scales must have size 32 in dimension 1"),
        ("int4", SCALES[..., :1], "pack_weight: scales must have size 2 in dimension 2"),
    ],
)
def test_bad_scales_raise(quantize, scales, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pack_weight(WEIGHT, quantize, scales)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (WEIGHT, r"unpack_weight: packed must be a packed weight, got shape \[2, 32, 64\]"),
        (WEIGHT[0], r"unpack_weight: packed must have 3 dimensions \[E, N/32, Kdim/32, 1024\], got shape \[32, 64\]"),
        (WEIGHT.double(), "unpack_weight: packed must be Float, BFloat16 or Half, got Double"),
        (torch.ones(1, 1, 1, 1023), r"packed must have the shape of a packed weight, got \[1, 1, 1, 1023\]"),
        (torch.ones(1, 1, 1024).char(), r"packed must have the shape of a packed weight, got \[1, 1, 1024\]"),
        (torch.ones(1, 1, 1024).to(E4M3), r"packed must have the shape of a packed weight, got \[1, 1, 1024\]"),
        (
            torch.ones(1, 1, 1, 1152).to(E4M3),
            r"packed must have 3 dimensions of a packed weight, got shape \[1, 1, 1, 1",
        ),
        (torch.ones(1, 1, 1, 1024).byte(), r"packed must have the shape of a packed weight, got \[1, 1, 1, 1024\]"),
        (torch.ones(1, 544).byte(), r"packed must have 4 dimensions of a packed weight, got shape \[1, 544\]"),
        (torch.ones(1, 1, 1, 1152).char(), r"packed must have 3 dimensions of a packed weight, got shape \[1, 1, 1, 1"),
    ],
)
def test_bad_packed_weight_raises(packed, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.unpack_weight(packed.to(device))


def test_packing_is_for_the_cpu(device):
    weight = WEIGHT.to(device)
    if device == "cpu":
        assert ops.pack_weight(weight).device == weight.device
        return
    with pytest.raises(RuntimeError, match=r"weight must be on the cpu \(pack there and move the result\), got cuda"):
        ops.pack_weight(weight)


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_weights_move_between_devices(shape, quantize, device, dtype):
    packed = ops.pack_weight(make(shape, dtype), quantize)
    assert_same_bits(ops.unpack_weight(packed.to(device)).cpu(), reference.unpack_weight(packed))


def test_backward_is_an_error_in_words():
    with pytest.raises(RuntimeError, match="pack_weight: has no backward"):
        ops.pack_weight(WEIGHT.clone().requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match="unpack_weight: has no backward"):
        ops.unpack_weight(ops.pack_weight(WEIGHT).requires_grad_()).sum().backward()


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", [(0, 32, 32), (2, 64, 96)], ids=str)
def test_opcheck(shape, quantize, device, dtype):
    weight = make(shape, dtype)
    float8 = quantize == "fp8"
    opcheck(torch.ops.mixtral.pack_weight.default, (weight, quantize), float8=float8)
    if quantize == "int4":
        scales = torch.full((*shape[:2], shape[2] // 32), 128, dtype=torch.uint8)
        opcheck(torch.ops.mixtral.pack_weight.default, (weight, quantize, scales))
    packed = ops.pack_weight(weight, quantize).to(device)
    opcheck(torch.ops.mixtral.unpack_weight.default, (packed,), float8=float8)
