"""Gradients of moe_mlp: closed form, tolerance, what is kept and computed, recomputation, experts without tokens."""

from functools import partial

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_same_product, opcheck, pack, with_threads
from error_bounds import moe_mlp_backward_bound
from gradients import (
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_gradients_within_tolerance,
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
from routing import ROUTINGS, make_routing

# T, H, I, E, K: no token, one; K = 1, 2, E; one expert; odd sizes
CASES = [
    (0, 8, 8, 4, 2),
    (1, 1, 1, 1, 1),
    (1, 5, 7, 3, 3),
    (3, 5, 7, 2, 2),
    (17, 40, 33, 3, 1),
    (65, 64, 96, 8, 2),
    (9, 33, 31, 4, 4),
]
MODES = ["none", "act", "all"]
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
backward_op = torch.ops.mixtral.moe_mlp_backward.default
for_backward = torch.ops.mixtral.moe_mlp_for_backward.default


def make(case: tuple, routing: str, device: str, dtype: torch.dtype) -> Layer:
    tokens, hidden, intermediate, experts, top_k = case
    gate_up = normal(experts, 2 * intermediate, hidden, dtype=torch.float64) / hidden**0.5
    down = normal(experts, hidden, intermediate, dtype=torch.float64) / intermediate**0.5
    return (
        normal(tokens, hidden, dtype=dtype).to(device),
        torch.rand(tokens, top_k).to(device),
        make_routing(routing, tokens, experts, top_k, device),
        gate_up.to(device, dtype),
        down.to(device, dtype),
    )


def make_grad(layer: Layer) -> torch.Tensor:
    return torch.randn_like(layer[0])


def run(layer: Layer, grad: torch.Tensor, recompute: str, wanted: tuple[int, ...] | None = None) -> list:
    """Gradients of x, topk_weights, gate_up_proj, down_proj."""
    return gradients(partial(ops.moe_mlp, recompute=recompute), layer, (grad,), wanted)


@pytest.mark.parametrize("case", [(4, 3, 2, 3, 2), (3, 2, 3, 2, 1)], ids=str)
def test_closed_form_is_the_derivative(case):
    x, weights, ids, gate_up, down = make(case, "half empty", "cpu", torch.float64)

    def at(x, weights, gate_up, down):
        return x, weights, ids, gate_up, down

    gradcheck_reference(
        lambda *inputs: reference.moe_mlp(*at(*inputs)),
        lambda grad, *inputs: reference.moe_mlp_backward(grad, *at(*inputs)),
        x,
        weights,
        gate_up,
        down,
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_autograd_of_the_reference(case, routing, device, dtype):
    assert_gradients_within_tolerance("moe_mlp", make(case, routing, device, dtype), moe_mlp_backward_bound)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(device, dtype):
    def make_arguments(dtype):
        experts = size(8)
        case = size(40), size(60), size(60), experts, size(experts)
        return make(case, ROUTINGS[size(4) - 1], "cpu", dtype)

    assert_random_cases("moe_mlp", make_arguments, device, dtype, moe_mlp_backward_bound)


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ["zipf", "half empty"])
@pytest.mark.parametrize("case", [*CASES, (40, 600, 520, 8, 2)], ids=str)
def test_recomputation_changes_no_bit(case, routing, device, dtype):
    layer = make(case, routing, device, dtype)
    grad, out = make_grad(layer), ops.moe_mlp(*layer)
    assert_same_product(for_backward(*layer)[0], out)
    kept = run(layer, grad, "none")
    for mode in ("act", "all"):
        for actual, expected in zip(run(layer, grad, mode), kept, strict=True):
            assert torch.equal(actual, expected)
    own = gradients(torch.ops.mixtral.moe_mlp, layer, (grad,))
    assert all(torch.equal(actual, expected) for actual, expected in zip(own, kept, strict=True))


@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_a_choice_of_no_expert_has_the_gradients_of_a_weight_of_zero(recompute, device, dtype):
    x, weights, ids, *experts = layer = make((9, 40, 32, 4, 3), "uniform", device, dtype)
    dropped = torch.arange(27, device=device).reshape(9, 3) % 4 == 0
    zero = (x, weights.masked_fill(dropped, 0), ids, *experts)
    grad = make_grad(layer)
    expected = run(zero, grad, recompute)
    expected[1] = expected[1].masked_fill(dropped, 0)
    none = (x, weights, ids.masked_fill(dropped, -1), *experts)
    for actual, want in zip(run(none, grad, recompute), expected, strict=True):
        assert_same_product(actual, want)


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads(dtype):
    layer = make((70, 200, 300, 4, 2), "zipf", "cpu", dtype)
    assert_same_with_one_and_two_threads("moe_mlp", layer)
    grad = make_grad(layer)
    for one, many in zip(*(with_threads(n, lambda: run(layer, grad, "none")) for n in (1, 5)), strict=True):
        assert torch.equal(one, many)


@pytest.mark.every_isa
def test_gradients_of_a_token_do_not_depend_on_the_batch(device, dtype):
    layer = make((70, 64, 96, 4, 2), "uniform", device, dtype)
    grad = make_grad(layer)
    whole = run(layer, grad, "act", (0, 1))
    for t in (0, 35, 69):
        x, weights, ids, *experts = layer
        alone = run((x[t : t + 1], weights[t : t + 1], ids[t : t + 1], *experts), grad[t : t + 1], "act", (0, 1))
        for part, all_tokens in zip(alone[:2], whole[:2], strict=True):
            assert_same_product(part[0], all_tokens[t])


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ["one expert", "half empty"])
def test_expert_without_tokens_has_gradients_of_exact_zeros(routing, device, dtype):
    """Memory that was freed holds NaN: whatever no kernel writes shows."""
    layer = make((9, 40, 24, 4, 2), routing, device, dtype)
    used = set(layer[2].flatten().tolist())
    poison = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape in [(4, 48, 40), (4, 40, 24)] * 8]
    del poison
    for grad in run(layer, make_grad(layer), "act")[2:]:
        assert grad.isfinite().all()
        for e in range(4):
            assert (grad[e].view(torch.int8) == 0).all() == (e not in used)


@pytest.mark.parametrize("recompute", MODES)
def test_keeps_what_the_formula_says(recompute, device):
    """8, 120 or 176 KiB a token and layer of Mixtral 8x7B in bf16: at a 64th of its sizes, a 64th of that."""
    tokens, hidden, intermediate, experts, top_k = case = (32, 4096 // 64, 14336 // 64, 8, 2)
    layer = make(case, "uniform", device, torch.bfloat16)
    x, weights, ids, gate_up, down = layer
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(layer, make_grad(layer), recompute)
    shapes = [weights.shape, ids.shape, gate_up.shape, down.shape]
    rows = {"none": [3 * intermediate], "act": [2 * intermediate], "all": []}[recompute]
    kept = [t for t in saved if t.shape not in shapes]
    kibibytes = sum(t.numel() * t.element_size() for t in kept) / tokens / 1024
    assert kibibytes == {"none": 176, "act": 120, "all": 8}[recompute] / 64
    assert kibibytes * 1024 == 2 * (hidden + top_k * sum(rows))
    assert sorted(t.shape for t in saved if t.shape in shapes) == sorted(shapes)
    # Copies of the rows, gate and up, its activation, the product of both, the outputs: what plain autograd keeps.
    plain = 2 * top_k * (2 * hidden + 4 * intermediate) / 1024
    assert kibibytes / plain <= {"none": 0.7, "act": 0.47, "all": 0.04}[recompute]


def test_plain_autograd_keeps_what_that_test_compares_with():
    """Bytes of the tensors that autograd of the separate steps keeps, without weights and indices."""
    tokens, hidden, intermediate, experts, top_k = case = (32, 64, 224, 8, 2)
    x, weights, ids, gate_up, down = make(case, "uniform", "cpu", torch.bfloat16)
    permuted, offs, row_map = reference.moe_permute(x, ids, experts)
    saved = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        rows = permuted.requires_grad_()
        gate, up = reference.grouped_gemm(rows, gate_up, offs).chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate) * up
        y = reference.grouped_gemm(activated, down, offs)
        copies = y[row_map.long()] * weights[..., None].bfloat16().requires_grad_()
    assert copies.requires_grad
    own = sum(saved.values())
    assert own >= 2 * tokens * top_k * (2 * hidden + 4 * intermediate)


def test_no_gradient_nothing_kept(device):
    layer = make((8, 16, 24, 4, 2), "uniform", device, torch.float32)
    leaves = tuple(t.requires_grad_() if t.is_floating_point() else t for t in layer)
    with torch.no_grad():
        assert not ops.moe_mlp(*leaves, recompute="none").requires_grad


@pytest.mark.parametrize("recompute", MODES)
def test_only_wanted_gradients(recompute, device, dtype, monkeypatch):
    """Frozen experts, as with LoRA, cost no product for them; a frozen router none for its weights."""
    layer = make((13, 16, 24, 4, 2), "uniform", device, dtype)
    monkeypatch.setattr(ops, "moe_mlp", partial(ops.moe_mlp, recompute=recompute))
    copies, intermediate = layer[2].numel(), layer[4].shape[2]
    forward = layer[0].numel() + copies * (2 * intermediate + (intermediate if recompute == "none" else 0))
    assert_only_wanted_gradients("moe_mlp", layer, extra=0 if recompute == "all" else forward)


@pytest.mark.every_isa
@pytest.mark.parametrize("quantize", [None, "int8", "fp8", "int4"])
def test_packed_weights(quantize, device):
    """The gradients of the other inputs are those at the product that the forward pass has seen."""
    x, weights, ids, gate_up, down = layer = make((20, 64, 32, 3, 2), "uniform", device, torch.bfloat16)
    packed = (x, weights, ids, pack(gate_up, quantize), pack(down, quantize))
    grad = make_grad(layer)
    modes = [run(packed, grad, mode, (0, 1)) for mode in MODES]
    for other in modes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[:2], modes[0][:2], strict=True))
    if quantize in (None, "int4"):  # products of the unpacked values, exactly
        plain = (x, weights, ids, ops.unpack_weight(packed[3]), ops.unpack_weight(packed[4]))
        expected = run(plain, grad, "act", (0, 1))
        for actual, want in zip(modes[0][:2], expected[:2], strict=True):
            assert_same_product(actual, want)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_packed_weight_has_no_gradient(name, device):
    x, weights, ids, gate_up, down = make((4, 32, 32, 2, 2), "uniform", device, torch.float32)
    gate_up, down = (pack(t) for t in (gate_up, down))
    {"gate_up_proj": gate_up, "down_proj": down}[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"moe_mlp: {name} is packed and has no gradient; give the plain weight"):
        ops.moe_mlp(x, weights, ids, gate_up, down).sum().backward()


def test_unknown_recomputation_is_an_error_in_words():
    with pytest.raises(ValueError, match="moe_mlp: recompute must be one of none, act, all, got some"):
        ops.moe_mlp(*make((1, 2, 2, 1, 1), "uniform", "cpu", torch.float32), recompute="some")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(2, 4)}, r"grad must have size 3 in dimension 1, got shape \[2, 4\]"),
        ({"grad": torch.ones(3)}, r"grad must have 2 dimensions \[T, H\], got shape \[3\]"),
        ({"grad": torch.ones(2, 3).half()}, "grad must be Float, got Half"),
        ({"x": torch.ones(2, 4)}, r"gate_up_proj must have size 4 in dimension 2, got shape \[4, 10, 3\]"),
        ({"gate_up": torch.ones(2, 9)}, r"gate_up must have size 10 in dimension 1, got shape \[2, 9\]"),
        ({"gate_up": torch.ones(2, 10).half()}, "gate_up must be Float, got Half"),
        ({"activated": torch.ones(3, 5)}, r"activated must have size 2 in dimension 0, got shape \[3, 5\]"),
    ],
)
def test_bad_input_raises(change, message, device):
    arguments = {
        "grad": torch.ones(2, 3),
        "x": torch.ones(2, 3),
        "topk_weights": torch.ones(2, 1),
        "topk_ids": torch.zeros(2, 1).int(),
        "gate_up_proj": torch.ones(4, 10, 3),
        "down_proj": torch.ones(4, 3, 5),
    } | change
    with pytest.raises(RuntimeError, match="moe_mlp_backward: " + message):
        backward_op(**{name: tensor.to(device) for name, tensor in arguments.items()})


def test_strided_gradient(device, dtype):
    layer = make((6, 8, 12, 3, 2), "uniform", device, dtype)
    row = normal(1, 8, dtype=dtype).to(device)
    for mode in MODES:
        expanded = run(layer, row.expand(6, -1), mode)
        assert all(torch.equal(a, b) for a, b in zip(expanded, run(layer, row.repeat(6, 1), mode), strict=True))


def test_second_derivative_is_an_error_in_words(device):
    layer = make((3, 4, 2, 2, 1), "uniform", device, torch.float32)
    with pytest.raises(RuntimeError, match="moe_mlp_backward: gradients of gradients are not supported"):
        second_derivative("moe_mlp", layer)


@pytest.mark.parametrize("recompute", MODES)
def test_compiles(recompute, device, monkeypatch):
    monkeypatch.setattr(ops, "moe_mlp", partial(ops.moe_mlp, recompute=recompute))
    assert_compiles("moe_mlp", make((12, 6, 16, 3, 2), "uniform", device, torch.float32))


@pytest.mark.parametrize("case", [(0, 8, 8, 4, 2), (5, 16, 9, 3, 2)], ids=str)
def test_opcheck(case, device, dtype):
    layer = make(case, "uniform", device, dtype)
    _, gate_up, activated = for_backward(*layer, True)
    grad = make_grad(layer)
    opcheck(backward_op, (grad, *layer))
    opcheck(backward_op, (grad, *layer, gate_up, activated, False, True, False, True))
    leaves = tuple(t.requires_grad_() if t.is_floating_point() else t for t in layer)
    opcheck(torch.ops.mixtral.moe_mlp.default, leaves)
    for keep in (False, True):
        opcheck(for_backward, (*leaves, keep))
