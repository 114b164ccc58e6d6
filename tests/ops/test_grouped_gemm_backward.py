"""Gradients of grouped_gemm: closed form, tolerance, order of sums, experts without rows, packed weights, autograd."""

import pytest
import torch

import mixtral.ops as ops
from conftest import DTYPES, assert_same_product, assert_within_tolerance, opcheck, pack, with_threads
from error_bounds import grouped_gemm_backward_input_bound, grouped_gemm_backward_weight_bound
from gradients import (
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_only_wanted_gradients,
    assert_random_cases,
    assert_same_with_one_and_two_threads,
    gradcheck_reference,
    gradients,
    normal,
    second_derivative,
    size,
)
from mixtral import reference
from routing import ROUTINGS, make_routing, offsets

# M, Kdim, N, E: around the sizes of words (2), transposed blocks (16, 32), panels (32), slices (256) and chunks (512)
CASES = [
    (0, 8, 5, 2),
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (5, 16, 33, 3),
    (33, 32, 64, 1),
    (130, 33, 31, 2),
    (65, 31, 513, 8),
    (600, 37, 65, 3),
]
PACKED_FORMATS = [(dtype, None) for dtype in DTYPES] + [(torch.bfloat16, "int8"), (torch.bfloat16, "int4")]
backward_input = torch.ops.mixtral.grouped_gemm_backward_input.default
backward_weight = torch.ops.mixtral.grouped_gemm_backward_weight.default


def make(case: tuple, routing: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """grad, a, b, offs."""
    rows, depth, columns, experts = case
    shapes = (rows, columns), (rows, depth), (experts, columns, depth)
    tensors = (normal(*shape, dtype=dtype).to(device) for shape in shapes)
    return *tensors, offsets(make_routing(routing, rows, experts, 1, device), experts)


@pytest.mark.parametrize("ends", [[4], [1, 1, 4]], ids=str)
def test_closed_form_is_the_derivative(ends):
    _, a, b, _ = make((4, 3, 2, len(ends)), "uniform", "cpu", torch.float64)
    offs = torch.tensor(ends)

    def closed_form(grad, a, b):
        return (
            reference.grouped_gemm_backward_input(grad, b, offs),
            reference.grouped_gemm_backward_weight(grad, a, offs),
        )

    gradcheck_reference(lambda a, b: reference.grouped_gemm(a, b, offs), closed_form, a, b)


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, routing, device, dtype):
    grad, a, b, offs = make(case, routing, device, dtype)
    for ends in (offs, offs.long()):
        assert_within_tolerance("grouped_gemm_backward_input", backward_input(grad, b, ends), grad, b, offs)
        assert_within_tolerance("grouped_gemm_backward_weight", backward_weight(grad, a, ends), grad, a, offs)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(device, dtype):
    def make_arguments(dtype):
        case = size(80), size(80), size(80), size(5)
        _, a, b, offs = make(case, ROUTINGS[size(4) - 1], "cpu", dtype)
        return a, b, offs

    def bounds(grad, a, b, offs):
        return (
            grouped_gemm_backward_input_bound(grad, b, offs),
            grouped_gemm_backward_weight_bound(grad, a, offs),
        )

    assert_random_cases("grouped_gemm", make_arguments, device, dtype, bounds)


@pytest.mark.every_isa
def test_order_of_sums_is_that_of_the_forward_pass(device, dtype):
    """Both gradients are products that grouped_gemm computes too, of transposed copies: the bits are the same."""
    grad, a, b, _ = make((700, 40, 600, 1), "uniform", device, dtype)
    offs, columns = torch.tensor([700], device=device), torch.tensor([600], device=device)
    assert_same_product(backward_input(grad, b, offs), ops.grouped_gemm(grad, b.mT, offs))
    assert_same_product(backward_weight(grad, a, offs)[0], ops.grouped_gemm(grad.T, a.T[None], columns))


@pytest.mark.every_isa
@pytest.mark.parametrize("case", [(300, 100, 1100, 3), (1500, 33, 40, 2)], ids=str)
def test_bits_do_not_depend_on_threads_or_other_experts(case, dtype):
    grad, a, b, offs = make(case, "zipf", "cpu", dtype)
    assert_same_with_one_and_two_threads("grouped_gemm", (a, b, offs))
    both, one = (with_threads(n, lambda: backward_weight(grad, a, offs)) for n in (5, 1))
    assert torch.equal(both, one)
    rows = slice(offs[0], offs[1])
    alone = backward_weight(grad[rows], a[rows], offs[1:2] - offs[0])
    assert torch.equal(alone[0], one[1])


@pytest.mark.every_isa
@pytest.mark.parametrize("ends", [[0, 0, 9], [0, 9, 9], [9, 9, 9], [0, 0, 0]], ids=str)
def test_expert_without_rows_has_a_gradient_of_exact_zeros(ends, device, dtype):
    """Memory that was freed holds NaN: whatever no kernel writes shows."""
    grad, a, _, _ = make((ends[-1], 40, 70, 3), "uniform", device, dtype)
    offs = torch.tensor(ends, device=device)
    poison = [torch.full((3, 70, 40), torch.nan, dtype=dtype, device=device) for _ in range(8)]
    del poison
    weight = backward_weight(grad, a, offs)
    assert weight.isfinite().all()
    for e in range(3):
        empty = ends[e] == (ends[e - 1] if e else 0)
        assert (weight[e].view(torch.int8) == 0).all() == empty


def test_empty_sizes(device, dtype):
    def run(rows: int, depth: int, columns: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        grad, a, b, _ = make((rows, depth, columns, experts), "uniform", device, dtype)
        offs = torch.full((experts,), rows, device=device)
        return backward_input(grad, b, offs), backward_weight(grad, a, offs)

    for sizes in ((0, 3, 4, 2), (3, 0, 4, 2), (3, 4, 0, 2), (0, 3, 4, 1)):
        rows, depth, columns, experts = sizes
        grad_a, grad_b = run(*sizes)
        assert torch.equal(grad_a, torch.zeros(rows, depth, device=device, dtype=dtype))
        assert torch.equal(grad_b, torch.zeros(experts, columns, depth, device=device, dtype=dtype))


def test_strided_and_expanded_inputs(device, dtype):
    wide = normal(12, 3 * 64 + 1, dtype=dtype).to(device)
    weights = normal(2, 10, 64, dtype=dtype).to(device)
    offs = torch.tensor([4, 0, 12, 0], device=device)[::2]
    ends = offs.contiguous()
    for grad in (wide[:, 1:65], wide[:, ::3][:, :64], wide[:1, :64].expand(12, -1), wide.flatten()[1:769].view(12, 64)):
        b = weights.transpose(1, 2)
        assert torch.equal(backward_input(grad, b, offs), backward_input(grad.clone(), b.contiguous(), ends))
        a = wide[:, 3:60:2]
        assert torch.equal(backward_weight(grad, a, offs), backward_weight(grad.clone(), a.contiguous(), ends))


@pytest.mark.every_isa
def test_nan_stays_in_its_row_and_expert(device, dtype):
    grad, a, b, _ = make((9, 6, 70, 3), "uniform", device, dtype)
    offs = torch.tensor([3, 6, 9], device=device)
    clean_a, clean_b = backward_input(grad, b, offs), backward_weight(grad, a, offs)
    grad[4, 69] = float("nan")
    grad_a, grad_b = backward_input(grad, b, offs), backward_weight(grad, a, offs)
    assert grad_a[4].isnan().all() and grad_b[1, 69].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(grad_a[others], clean_a[others])
    assert torch.equal(grad_b[[0, 2]], clean_b[[0, 2]]) and torch.equal(grad_b[1, :69], clean_b[1, :69])


@pytest.mark.every_isa
@pytest.mark.parametrize(("dtype", "quantize"), [*PACKED_FORMATS, (torch.bfloat16, "fp8")], ids=str)
def test_gradient_through_a_packed_weight_is_that_of_the_unpacked_one(dtype, quantize, device):
    grad, a, b, offs = make((40, 64, 96, 3), "zipf", device, dtype)
    packed = pack(b, quantize)
    expected = backward_input(grad, ops.unpack_weight(packed), offs)
    assert torch.equal(backward_input(grad, packed, offs), expected)
    a.requires_grad_()
    ops.grouped_gemm(a, packed, offs).backward(grad)
    assert torch.equal(a.grad, expected)


def test_packed_weight_has_no_gradient(device):
    _, a, b, offs = make((4, 32, 32, 2), "uniform", device, torch.float32)
    packed = pack(b).requires_grad_()
    with pytest.raises(RuntimeError, match="grouped_gemm: b is packed and has no gradient; give the plain weight"):
        ops.grouped_gemm(a, packed, offs).sum().backward()


def test_only_wanted_gradients(device, dtype):
    _, a, b, offs = make((40, 24, 16, 3), "uniform", device, dtype)
    assert_only_wanted_gradients("grouped_gemm", (a, b, offs))


@pytest.mark.parametrize(("wanted", "kept"), [((0,), "b"), ((1,), "a")])
def test_saves_only_what_the_wanted_gradients_need(wanted, kept, device):
    _, a, b, offs = make((40, 24, 16, 3), "uniform", device, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        gradients(ops.grouped_gemm, (a, b, offs), (torch.ones(40, 16, device=device),), wanted)
    assert [x.shape for x in saved] == [{"a": a, "b": b}[kept].shape, offs.shape]


GRAD, A, B, OFFS = torch.ones(4, 5), torch.ones(4, 2), torch.ones(3, 5, 2), torch.tensor([1, 2, 4])


@pytest.mark.parametrize(
    ("grad", "b", "offs", "message"),
    [
        (GRAD[0], B, OFFS, r"grad must have 2 dimensions \[M, N\], got shape \[5\]"),
        (GRAD.double(), B, OFFS, "grad must be Float, BFloat16 or Half, got Double"),
        (GRAD, B[0], OFFS, r"b must have 3 dimensions \[E, N, Kdim\], got shape \[5, 2\]"),
        (GRAD, B[:, :4], OFFS, r"b must have size 5 in dimension 1, got shape \[3, 4, 2\]"),
        (GRAD, B.half(), OFFS, "b must be Float, got Half"),
        (GRAD, B, OFFS[None], r"offs must have 1 dimensions \[E\], got shape \[1, 3\]"),
        (GRAD, B, OFFS[:2], r"offs must have size 3 in dimension 0, got shape \[2\]"),
        (GRAD, B, OFFS.float(), "offs must be Int or Long, got Float"),
    ],
)
def test_bad_input_of_the_gradient_of_a_raises(grad, b, offs, message, device):
    with pytest.raises(RuntimeError, match="grouped_gemm_backward_input: " + message):
        backward_input(grad.to(device), b.to(device), offs.to(device))


@pytest.mark.parametrize(
    ("grad", "a", "offs", "message"),
    [
        (GRAD[0], A, OFFS, r"grad must have 2 dimensions \[M, N\], got shape \[5\]"),
        (GRAD, A[0], OFFS, r"a must have 2 dimensions \[M, Kdim\], got shape \[2\]"),
        (GRAD, A[:3], OFFS, r"a must have size 4 in dimension 0, got shape \[3, 2\]"),
        (GRAD, A.half(), OFFS, "a must be Float, got Half"),
        (GRAD, A, OFFS.float(), "offs must be Int or Long, got Float"),
    ],
)
def test_bad_input_of_the_gradient_of_b_raises(grad, a, offs, message, device):
    with pytest.raises(RuntimeError, match="grouped_gemm_backward_weight: " + message):
        backward_weight(grad.to(device), a.to(device), offs.to(device))


@pytest.mark.parametrize("ends", [[3, 2, 4], [-1, 2, 4], [1, 2, 3], [1, 2, 2**32 + 4]], ids=str)
def test_bad_offsets_raise_on_the_cpu(ends):
    for call in (
        lambda: backward_input(GRAD, B, torch.tensor(ends)),
        lambda: backward_weight(GRAD, A, torch.tensor(ends)),
    ):
        with pytest.raises(RuntimeError, match="grouped_gemm_backward_.*: offs must "):
            call()


def test_second_derivative_is_an_error_in_words(device):
    _, a, b, offs = make((4, 3, 2, 2), "uniform", device, torch.float32)
    with pytest.raises(RuntimeError, match="grouped_gemm_backward_.*: gradients of gradients are not supported"):
        second_derivative("grouped_gemm", (a, b, offs))


def test_compiles(device):
    _, a, b, offs = make((12, 6, 16, 3), "uniform", device, torch.float32)
    assert_compiles("grouped_gemm", (a, b, offs))


@pytest.mark.parametrize("case", [(0, 8, 5, 2), (5, 16, 33, 3), (1, 3, 2, 1)], ids=str)
def test_opcheck(case, device, dtype):
    grad, a, b, offs = make(case, "uniform", device, dtype)
    opcheck(backward_input, (grad, b, offs))
    opcheck(backward_weight, (grad, a, offs))
    opcheck(torch.ops.mixtral.grouped_gemm.default, (a.requires_grad_(), b.requires_grad_(), offs))


@pytest.mark.parametrize(("dtype", "quantize"), PACKED_FORMATS, ids=str)
def test_opcheck_of_packed_weights(dtype, quantize, device):
    grad, _, b, offs = make((5, 64, 96, 3), "uniform", device, dtype)
    opcheck(backward_input, (grad, pack(b, quantize), offs))
