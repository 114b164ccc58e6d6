"""Gradients of sliding_window_attention: closed form, tolerance, masks, NaN, invariances, and the ways of autograd."""

import pytest
import torch

import mixtral.ops as ops
from conftest import opcheck, with_threads
from error_bounds import sliding_window_attention_backward_bound
from gradients import (
    CASES,
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_gradients_within_tolerance,
    assert_random_cases,
    assert_same_with_one_and_two_threads,
    gradcheck_reference,
    gradients,
    normal,
    second_derivative,
    size,
)
from mixtral import reference

OP = "sliding_window_attention"
for_backward = torch.ops.mixtral.sliding_window_attention_for_backward.default
backward = torch.ops.mixtral.sliding_window_attention_backward.default


def starts(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def make(
    lengths_q: list[int],
    lengths_k: list[int],
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
) -> tuple[torch.Tensor, ...]:
    """q, k, v, cu_seqlens_q, cu_seqlens_k of random packed sequences."""
    q = normal(sum(lengths_q), heads[0], head_dim, dtype=dtype).to(device)
    k, v = normal(2, sum(lengths_k), heads[1], head_dim, dtype=dtype).to(device)
    return q, k, v, starts(lengths_q, device), starts(lengths_k, device)


def assert_matches_reference(*arguments) -> None:
    assert_gradients_within_tolerance(OP, arguments, sliding_window_attention_backward_bound)


def grads_of(problem: tuple, grad: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of q, k and v."""
    return gradients(ops.sliding_window_attention, problem, (grad,))


@pytest.mark.parametrize(("window", "causal"), [(0, True), (3, True), (0, False)])
def test_closed_form_is_the_derivative(window, causal):
    q, k, v, cu_q, cu_k = make([4, 3, 0], [6, 2, 1], "cpu", torch.float64, (4, 2), 5)
    options = (cu_q, cu_k, window, causal, 0.4)

    def closed_form(grad, q, k, v):
        out, lse = reference.sliding_window_attention_for_backward(q, k, v, *options)
        return reference.sliding_window_attention_backward(grad, q, k, v, out, lse, *options)

    gradcheck_reference(lambda *x: reference.sliding_window_attention(*x, *options), closed_form, q, k, v)


@pytest.mark.every_isa
@pytest.mark.parametrize("window", [0, 1, 3, 16, 70])
def test_prompts_around_multiples_of_the_window(window, device, dtype):
    w = window or 16
    lengths = [w - 1, w, w + 1, 2 * w - 1, 2 * w + 1, 129]
    assert_matches_reference(*make(lengths, lengths, device, dtype), window)


@pytest.mark.every_isa
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 2), (32, 8), (13, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 128, 160, 256])
def test_head_counts_and_head_dims(heads, head_dim, device, dtype):
    assert_matches_reference(*make([5, 1, 19], [9, 40, 19], device, dtype, heads, head_dim), 11)


@pytest.mark.every_isa
@pytest.mark.parametrize(("window", "causal"), [(0, True), (100, True), (0, False)])
def test_many_tiles_of_queries_and_blocks_of_keys(window, causal, device, dtype):
    assert_matches_reference(*make([70, 300], [300, 200], device, dtype, (8, 2), 64), window, causal)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(dtype):
    def make_arguments(dtype):
        sequences, kv_heads = size(4), size(3)
        lengths = [(size(90), size(90)) for _ in range(sequences)]
        lengths_q = [q if size(5) > 1 else 0 for q, _ in lengths]
        lengths_k = [q if size(3) > 1 else k for q, k in lengths]
        heads = kv_heads * size(4), kv_heads
        problem = make(lengths_q, lengths_k, "cpu", dtype, heads, size(80))
        scale = [None, 0.1, -0.5][size(3) - 1]
        return (*problem, 0, False, scale) if size(4) == 4 else (*problem, size(100) - 1, True, scale)

    assert_random_cases(OP, make_arguments, dtype, sliding_window_attention_backward_bound, cases=max(CASES, 220))


@pytest.mark.every_isa
def test_large_scores(device):
    q, k, v, cu_q, cu_k = make([70], [70], device, torch.float32)
    assert_matches_reference(q * 30, k * torch.linspace(-5, 5, 70, device=device).view(-1, 1, 1), v, cu_q, cu_k)


@pytest.mark.every_isa
def test_one_key_in_sight_has_the_weight_one(device, dtype):
    """Then the result is its value, whatever q and k are, and their gradients are exactly zero."""
    q, k, v, cu_q, cu_k = make([1, 40, 1], [1, 40, 1], device, dtype, (4, 2), 48)
    grad = normal(*q.shape, dtype=dtype).to(device)
    grad_q, grad_k, grad_v = grads_of((q, k, v, cu_q, cu_k, 1), grad)
    assert (grad_q == 0).all() and (grad_k == 0).all()
    torch.testing.assert_close(grad_v, grad.double().unflatten(1, (2, 2)).sum(2).to(dtype))


@pytest.mark.every_isa
def test_forward_has_the_bits_of_the_op_without_gradient(device, dtype):
    problem = make([70, 3, 9], [200, 5, 4], device, dtype, (4, 2), 40)
    out, lse = for_backward(*problem, 60)
    assert torch.equal(out, ops.sliding_window_attention(*problem, 60))
    wide = reference.sliding_window_attention_for_backward(*(x.double() for x in problem[:3]), *problem[3:], 60)[1]
    torch.testing.assert_close(lse.double(), wide, rtol=0, atol=4e-3 if dtype == torch.bfloat16 else 4e-6)
    assert (lse[:, 73:78] == -torch.inf).all()


@pytest.mark.every_isa
def test_queries_and_keys_without_each_other(device, dtype):
    """Queries before the first key, sequences without keys or queries, keys behind every window."""
    q, k, v, cu_q, cu_k = make([10, 3, 0, 2], [4, 0, 5, 50], device, dtype)
    grads = grads_of((q, k, v, cu_q, cu_k, 3), torch.full_like(q, float("inf")))
    grad_q, grad_k, grad_v = (x.isfinite().all(-1).all(-1) for x in grads)
    assert grad_q.tolist() == [True] * 6 + [False] * 4 + [True] * 3 + [False] * 2
    seen = [False] * 4 + [True] * 5 + [True] * 46 + [False] * 4
    assert grad_k.tolist() == seen and grad_v.tolist() == seen
    for gradient, finite in zip(grads, (grad_q, grad_k, grad_v), strict=True):
        assert (gradient[finite] == 0).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_nan_reaches_only_what_sees_it(name, window, device, dtype):
    """Everything else keeps its bits, in tiles of many queries and blocks of many keys."""
    length = 150
    q, k, v, cu, _ = make([length, 5], [length, 5], device, dtype, (4, 2), 40)
    tensors = {"q": q, "k": k, "v": v, "grad": normal(*q.shape, dtype=dtype).to(device)}

    def run(tensors: dict) -> list[torch.Tensor]:
        return grads_of((tensors["q"], tensors["k"], tensors["v"], cu, cu, window), tensors["grad"])

    clean, reach = run(tensors), window or length
    for position in (0, 63, 100, 149):
        spoilt = {key: x.clone() for key, x in tensors.items()}
        spoilt[name][position, 0, 3] = float("nan")
        if name in ("q", "grad"):
            queries, heads = range(position, position + 1), slice(0, 1)
        else:
            queries, heads = range(position, min(position + reach, length)), slice(0, 2)
        keys = slice(max(0, queries[0] - reach + 1), queries[-1] + 1)
        grad_q, grad_k, grad_v = actual = run(spoilt)
        assert grad_q[queries[0] : queries[-1] + 1, heads].isnan().all()
        assert grad_k[keys, 0].isnan().all()
        assert grad_v[keys, 0].isnan().any(-1).all() or name == "v"
        expected = [x.clone() for x in clean]
        expected[0][queries[0] : queries[-1] + 1, heads] = torch.nan
        expected[1][keys, 0] = torch.nan
        expected[2][keys, 0] = grad_v[keys, 0]
        for x, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads_or_neighbours(dtype):
    lengths = [70, 1, 0, 129]
    q, k, v, cu, _ = make(lengths, lengths, "cpu", dtype, (8, 2), 40)
    assert_same_with_one_and_two_threads(OP, (q, k, v, cu, cu, 50))
    grad = normal(*q.shape, dtype=dtype)
    whole = grads_of((q, k, v, cu, cu, 50), grad)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        own = starts([end - begin], "cpu")
        rows = slice(begin, end)
        alone = grads_of((q[rows], k[rows], v[rows], own, own, 50), grad[rows])
        for x, want in zip(alone, whole, strict=True):
            assert torch.equal(x, want[rows])


@pytest.mark.every_isa
def test_memory_of_earlier_calls_does_not_matter(dtype):
    problem, grad = make([33], [33], "cpu", dtype, (4, 2), 33), normal(33, 4, 33, dtype=dtype)

    def run() -> list[torch.Tensor]:
        return grads_of(problem, grad)

    clean = with_threads(1, run)
    spoilt = make([100], [100], "cpu", dtype, (4, 2), 64)
    nan = torch.full((100, 4, 64), float("nan"), dtype=dtype)
    with_threads(1, lambda: grads_of((nan, *spoilt[1:]), nan))
    for x, want in zip(with_threads(1, run), clean, strict=True):
        assert torch.equal(x, want)


def test_strided_and_expanded_inputs(device, dtype):
    packed = normal(21, 4 + 2 + 2, 16, dtype=dtype).to(device)
    q, k, v, cu = packed[:, :4], packed[:, 4:6], packed[:, 6:], starts([21], device)
    grad = normal(1, 1, 16, dtype=dtype).to(device).expand(21, 4, 16)
    expected = grads_of((q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, 6), grad.contiguous())
    for x, want in zip(grads_of((q, k, v, cu.int(), cu, 6), grad), expected, strict=True):
        assert torch.equal(x, want)


def test_gradient_of_the_op_itself(device, dtype):
    """torch.ops.mixtral.sliding_window_attention keeps no lse: it computes it in the backward pass."""
    problem = make([9, 30], [12, 30], device, dtype)
    grad = normal(*problem[0].shape, dtype=dtype).to(device)
    expected = grads_of((*problem, 5), grad)
    for x, want in zip(
        gradients(torch.ops.mixtral.sliding_window_attention, (*problem, 5), (grad,)), expected, strict=True
    ):
        assert torch.equal(x, want)


def test_one_input_wants_a_gradient(device):
    problem = make([9], [12], device, torch.float32)
    grad = torch.randn_like(problem[0])
    expected = grads_of(problem, grad)
    for i in range(3):
        some = gradients(ops.sliding_window_attention, problem, (grad,), wanted=(i,))
        assert torch.equal(some[i], expected[i]) and [x is None for x in some].count(True) == 2


GOOD = {
    "grad": torch.ones(3, 4, 8),
    "q": torch.ones(3, 4, 8),
    "k": torch.ones(5, 2, 8),
    "v": torch.ones(5, 2, 8),
    "out": torch.ones(3, 4, 8),
    "lse": torch.ones(4, 3),
    "cu_seqlens_q": torch.tensor([0, 3]),
    "cu_seqlens_k": torch.tensor([0, 5]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(3, 4, 7)}, r"grad must have size 8 in dimension 2, got shape \[3, 4, 7\]"),
        ({"grad": torch.ones(3, 4, 8).half()}, "grad must be Float, got Half"),
        ({"out": torch.ones(3, 2, 8)}, r"out must have size 4 in dimension 1, got shape \[3, 2, 8\]"),
        ({"out": torch.ones(12, 8)}, r"out must have 3 dimensions \[Tq, Nq, D\], got shape \[12, 8\]"),
        ({"lse": torch.ones(3, 4)}, r"lse must have size 4 in dimension 0, got shape \[3, 4\]"),
        ({"lse": torch.ones(4, 3).double()}, "lse must be Float, got Double"),
        ({"q": torch.ones(3, 3, 8)}, r"q must have a multiple of the 2 key/value heads, got shape \[3, 3, 8\]"),
        ({"v": torch.ones(4, 2, 8)}, r"v must have size 5 in dimension 0, got shape \[4, 2, 8\]"),
        ({"window": -1}, r"window must be >= 0 \(0: no window\), got -1"),
        ({"window": 4, "causal": False}, "window must be 0 when causal is false, got 4"),
    ],
)
def test_bad_input_raises(change, message, device):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (GOOD | change).items()}
    with pytest.raises(RuntimeError, match=f"{OP}_backward: {message}"):
        backward(**moved)


def test_bad_cu_seqlens_raise_on_cpu():
    with pytest.raises(RuntimeError, match=f"{OP}_backward: cu_seqlens_q must end at 3, got 2"):
        backward(**(GOOD | {"cu_seqlens_q": torch.tensor([0, 2])}))


def test_second_derivative_is_an_error_in_words(device):
    with pytest.raises(RuntimeError, match=f"{OP}_backward: gradients of gradients are not supported"):
        second_derivative(OP, make([3], [3], device, torch.float32))


def test_compiles(device):
    assert_compiles(OP, (*make([9, 3], [12, 3], device, torch.float32), 5))


@pytest.mark.parametrize("lengths", [[], [3, 0, 9]], ids=str)
def test_opcheck(lengths, device, dtype):
    q, k, v, cu_q, cu_k = make(lengths, lengths, device, dtype)
    out, lse = for_backward(q, k, v, cu_q, cu_k, 4)
    opcheck(backward, (torch.ones_like(out), q, k, v, out, lse, cu_q, cu_k), {"window": 4, "scale": 0.3})
    leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), cu_q, cu_k)
    opcheck(torch.ops.mixtral.sliding_window_attention.default, leaves, {"window": 4})
    opcheck(for_backward, leaves, {"causal": False})
