"""pack_weight and unpack_weight: every byte of every format, what a quantised weight stands for, and the errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import opcheck, with_threads
from mixtral import reference

FORMATS = [None, "int8", "int4"]
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
    scales = weight.double().abs().amax(-1, keepdim=True) / 127
    stands_for = ops.unpack_weight(ops.pack_weight(weight, "int8")).double()
    rounding = stands_for.abs() * torch.finfo(torch.bfloat16).eps / 2
    assert ((stands_for - weight.double()).abs() <= 0.5001 * scales + rounding).all()


def test_int4_error_is_half_a_step_but_where_it_saturates(dtype):
    """The extreme of 32 depths is -8 steps; what lies beyond 7.5 on the other side becomes 7: up to one step."""
    weight = torch.cat((special_rows(dtype), make((1, 64, 64), dtype)), 1)
    groups = weight.double().unflatten(-1, (-1, 32))
    scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    stands_for = ops.unpack_weight(ops.pack_weight(weight, "int4")).double().unflatten(-1, (-1, 32))
    rounding = stands_for.abs() * torch.finfo(torch.bfloat16).eps / 2
    steps = torch.where(groups / scales > 7.49, 1.0, 0.5)
    # The rounding of the scale counts up to 8 times: relative to it, or absolute where it is subnormal.
    bound = (steps + 8 * 2.0**-11) * scales.abs() + rounding + 8 * 2.0**-25
    assert ((stands_for - groups).abs() <= bound).all()
    assert (stands_for[0, 4, 0, 8], stands_for[0, 4, 0, 9]) == (-5, 4.375)
    assert (stands_for[0, 5, 0, 8], stands_for[0, 5, 0, 9]) == (5, -4.375)


@pytest.mark.parametrize("quantize", FORMATS)
def test_zero_rows_stay_zero(quantize, dtype):
    assert not ops.unpack_weight(ops.pack_weight(torch.zeros(2, 64, 64, dtype=dtype), quantize)).any()


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, quantize, dtype):
    weight = make(shape, dtype)
    packed = ops.pack_weight(weight, quantize)
    blocks = (shape[0], shape[1] // 32)
    expected = {None: (shape[2] // 32, 1024), "int8": (32 * shape[2] + 128,), "int4": (shape[2] // 32, 576)}
    assert packed.shape == blocks + expected[quantize] and ops.unpack_weight(packed).shape == shape


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_that_are_not_finite_cannot_be_quantised(quantize, value, dtype):
    weight = make((2, 64, 96), dtype)
    weight[1, 40, 95] = value
    message = {
        "int8": "pack_weight: weight must be finite to be int8, got inf or NaN",
        "int4": "pack_weight: weight must be below 524160 to be int4, got more, inf or NaN",
    }
    with pytest.raises(RuntimeError, match=message[quantize]):
        ops.pack_weight(weight, quantize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int4_needs_scales_within_f16(dtype):
    weight = make((1, 32, 32), dtype)
    for sign in (-1, 1):
        weight[0, 31, 31] = sign * 524160
        with pytest.raises(RuntimeError, match="pack_weight: weight must be below 524160 to be int4, got more"):
            ops.pack_weight(weight.float(), "int4")
        weight[0, 31, 31] = sign * 522240
        assert ops.unpack_weight(ops.pack_weight(weight, "int4")).isfinite().all()


WEIGHT = torch.ones(2, 32, 64)


@pytest.mark.parametrize(
    ("weight", "quantize", "message"),
    [
        (WEIGHT[0], None, r"pack_weight: weight must have 3 dimensions \[E, N, Kdim\], got shape \[32, 64\]"),
        (WEIGHT.double(), None, "pack_weight: weight must be Float, BFloat16 or Half, got Double"),
        (WEIGHT.char(), "int8", "pack_weight: weight must be Float, BFloat16 or Half, got Char"),
        (WEIGHT[:, :31], None, r"weight must have N and Kdim that are multiples of 32, got shape \[2, 31, 64\]"),
        (WEIGHT[..., :48], "int4", r"weight must have N and Kdim that are multiples of 32, got shape \[2, 32, 48\]"),
        (WEIGHT, "int2", 'pack_weight: quantize must be None, "int8" or "int4", got "int2"'),
        (WEIGHT, "", 'pack_weight: quantize must be None, "int8" or "int4", got ""'),
    ],
)
def test_bad_weight_raises(weight, quantize, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pack_weight(weight, quantize)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (WEIGHT, r"unpack_weight: packed must be a packed weight, got shape \[2, 32, 64\]"),
        (WEIGHT[0], r"unpack_weight: packed must have 3 dimensions \[E, N/32, Kdim/32, 1024\], got shape \[32, 64\]"),
        (WEIGHT.double(), "unpack_weight: packed must be Float, BFloat16 or Half, got Double"),
        (torch.ones(1, 1, 1, 1023), r"packed must have the shape of a packed weight, got \[1, 1, 1, 1023\]"),
        (torch.ones(1, 1, 1024).char(), r"packed must have the shape of a packed weight, got \[1, 1, 1024\]"),
        (torch.ones(1, 1, 1, 1024).byte(), r"packed must have the shape of a packed weight, got \[1, 1, 1, 1024\]"),
        (torch.ones(1, 576).byte(), r"packed must have 4 dimensions of a packed weight, got shape \[1, 576\]"),
        (torch.ones(1, 1, 1, 1152).char(), r"packed must have 3 dimensions of a packed weight, got shape \[1, 1, 1, 1"),
    ],
)
def test_bad_packed_weight_raises(packed, message):
    with pytest.raises(RuntimeError, match=message):
        ops.unpack_weight(packed)


def test_the_layout_is_for_the_cpu(device):
    weight = WEIGHT.to(device)
    if device == "cpu":
        assert ops.pack_weight(weight).device == weight.device
        return
    for op, argument in ((ops.pack_weight, weight), (ops.unpack_weight, ops.pack_weight(WEIGHT).to(device))):
        with pytest.raises(NotImplementedError, match=f"Could not run 'mixtral::{op.__name__}'.*'CUDA' backend"):
            op(argument)


def test_backward_is_an_error_in_words():
    with pytest.raises(RuntimeError, match="pack_weight: has no backward"):
        ops.pack_weight(WEIGHT.clone().requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match="unpack_weight: has no backward"):
        ops.unpack_weight(ops.pack_weight(WEIGHT).requires_grad_()).sum().backward()


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", [(0, 32, 32), (2, 64, 96)], ids=str)
def test_opcheck(shape, quantize, dtype):
    weight = make(shape, dtype)
    opcheck(torch.ops.mixtral.pack_weight.default, (weight, quantize))
    opcheck(torch.ops.mixtral.unpack_weight.default, (ops.pack_weight(weight, quantize),))
