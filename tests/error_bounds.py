"""How far a correct op can be from the f64 reference: a bound for every element, by the documented order of operations.

docs/numerics.md, "Tolerance", has the argument. Each ``<op>_bound`` takes the arguments of the op. A rounding to f32 is
off by at most ``U`` times the rounded number. A bound adds this up over all roundings of the op, with what later steps
make of each error, and ends with the rounding to the result's dtype. Where the CPU and CUDA kernels or the instruction
sets have different orders, it covers all of them.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from mixtral import reference

U = 2.0**-24  # largest relative error of a rounding to f32
EXP = 2 * U  # largest relative error of exp, sine and cosine in f32: one unit in the last place
TINY = torch.finfo(torch.float32).tiny
# For roundings of numbers that are off by roundings themselves: fewer than 1000 follow each other, and 1000 U < 0.001.
SECOND_ORDER = 1.001


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """f64: the largest error of rounding a number of at most ``value`` in magnitude to ``dtype``."""
    value = value.abs().clamp(min=torch.finfo(dtype).tiny)
    return value / torch.frexp(value).mantissa * torch.finfo(dtype).eps / 4  # the quotient: the next power of two


def rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of an f32 number within ``error`` of ``value`` after its rounding to ``dtype``."""
    return error if dtype == torch.float32 else error + half_ulp(value.abs() + error, dtype)


# ---- ops on single rows ----------------------------------------------------------------------------------------------


def rms_norm_bound(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden, weight = x.shape[1], weight.double()
    squares = min(hidden, max(-(-hidden // 16) + 4, -(-hidden // 256) + 18))  # CPU: 16 lanes, a tree; CUDA: 256 lanes
    scale = (squares + 3) / 2 + 4  # mean, eps and their sum, halved by the root; root and reciprocal
    normed = reference.rms_norm(x.double(), torch.ones_like(weight), eps)
    normed_error = rounded(normed, normed.abs() * (scale + 1) * U * SECOND_ORDER, x.dtype)
    out, inherited = normed * weight, normed_error * weight.abs()
    return rounded(out, inherited + U * (out.abs() + inherited), x.dtype)


def rms_norm_backward_bound(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (rows, hidden), dtype = x.shape, x.dtype
    grad, x, weight = grad.double(), x.double(), weight.double()
    squares = min(hidden, max(-(-hidden // 16) + 4, -(-hidden // 256) + 18))  # as in rms_norm_bound
    scale_error = (squares + 3) / 2 + 4
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    upper, normed = grad * weight, x * scale
    products = (upper * normed).abs().mean(-1, keepdim=True)
    size = scale * (upper.abs() + normed.abs() * (upper * normed).mean(-1, keepdim=True).abs())
    error = scale * normed.abs() * products * (squares + 5 + 2 * scale_error) + size * (scale_error + 4)
    exact = scale * (upper - normed * (upper * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        exact = exact + grad_sum.double()
        error = error + exact.abs() + grad_sum.double().abs()
    terms = (grad * normed).abs().sum(0) * (scale_error + 2 + min(rows, 32) + -(-rows // 32))  # row blocks of 32
    grad_x = rounded(exact, error * U * SECOND_ORDER, dtype)
    return grad_x, rounded((grad * normed).sum(0), terms * U * SECOND_ORDER, dtype)


def add_rms_norm_backward_bound(
    grad_normed: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return rms_norm_backward_bound(grad_normed, total, weight, eps, grad_sum)


def rope_bound(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    sine = 6 * U if q.is_cuda else EXP  # CUDA first rounds the angle, reduced to -pi to pi, to f32

    def bound(x: Tensor) -> Tensor:
        """Of a cos - b sin and b cos + a sin: two products and a sum, each at most |a| + |b|."""
        pairs = x.double().abs().unflatten(-1, (-1, 2) if interleaved else (2, -1))
        size = pairs.sum(-1 if interleaved else -2, keepdim=True).expand_as(pairs).flatten(-2)
        return rounded(size, size * (sine + 2 * U) * SECOND_ORDER, x.dtype)

    return bound(q), bound(k)


def swiglu_bound(gate_up: Tensor, inherited: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``inherited``: the error of gate_up itself, then in f64; ``dtype``: of the result."""
    dtype = dtype or gate_up.dtype
    gate, up = gate_up.double().chunk(2, dim=-1)
    gate_error, up_error = (
        torch.zeros_like(gate_up).double().chunk(2, dim=-1) if inherited is None else inherited.chunk(2, -1)
    )
    silu, up = torch.nn.functional.silu(gate).abs(), up.abs()
    before = (silu + 1.1 * gate_error) * (up + up_error) - silu * up  # the slope of silu is below 1.1
    # exp, sum, division and product. With 16 bits CUDA divides to 2 units in the last place.
    own = (EXP + (3 if dtype == torch.float32 else 6) * U) * (silu * up + before)
    return rounded(silu * up, (before + own) * SECOND_ORDER + TINY, dtype)


def swiglu_backward_bound(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    sigmoid, rest = gate.sigmoid(), (-gate).sigmoid()
    relative = EXP + (3 if gate_up.dtype == torch.float32 else 4) * U  # exp, sum and division, as in swiglu_bound
    slope = 1 + (gate * rest).abs()  # of silu: s (1 + gate (1 - s)), whose second term may cancel the first
    slope_error = gate.abs() * (sigmoid * relative + U) + 2 * U * slope
    size = torch.cat((grad.double() * up * sigmoid * slope, grad.double() * gate * sigmoid), -1).abs()
    error = (relative + 3 * U) * size
    error += torch.cat((grad.double() * up * sigmoid * slope_error, torch.zeros_like(gate)), -1).abs()
    vanished = TINY * (grad.double().abs() * (1 + gate.abs())).repeat(1, 2) * (1 + up.abs()).repeat(1, 2)
    exact = reference.swiglu_backward(grad.double(), gate_up.double())
    return rounded(exact, error * SECOND_ORDER + vanished, gate_up.dtype)


def topk_softmax_bound(
    router_logits: Tensor, top_k: int, renormalize: bool = True, inherited: Tensor | float = 0.0
) -> Tensor:
    """Of the weights of the experts that the exact logits choose. ``inherited``: the error of the logits themselves."""
    logits, experts = router_logits.double(), router_logits.shape[1]
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    below = logits.amax(-1, keepdim=True) - logits  # the difference is rounded before exp
    exp_error, p = torch.expm1(inherited + U * below + EXP), logits.softmax(-1)
    terms, term_errors = (p.gather(1, chosen), exp_error.gather(1, chosen)) if renormalize else (p, exp_error)
    additions = min(experts, max(top_k, -(-experts // 32) + 5))  # CUDA: a warp, in f32; the CPU adds in f64
    sum_error = (terms * term_errors).sum(-1, keepdim=True) / terms.sum(-1, keepdim=True) + additions * U
    relative = (1 + exp_error.gather(1, chosen)) / (1 - sum_error) - 1 + U
    return relative * SECOND_ORDER * reference.topk_softmax(logits, top_k, renormalize)[0]


def lanes_bound(terms: Tensor, lanes: int) -> Tensor:
    """f64 [T,E,H] -> [T,E]: lane j adds the terms j (mod lanes) in order, then lanes are added by halves."""
    partial_sums = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % lanes)).unflatten(-1, (-1, lanes)).cumsum(-2)
    sizes, sums = partial_sums.abs().sum((-1, -2)), partial_sums[..., -1, :]
    while lanes > 1:
        lanes //= 2
        sums = sums[..., :lanes] + sums[..., lanes:]
        sizes = sizes + sums.abs().sum(-1)
    return U * SECOND_ORDER * sizes


def route_logits_bound(x: Tensor, router: Tensor) -> Tensor:
    """Of the logits of moe_route."""
    hidden, wide, rows = x.shape[1], x.double(), router.double()
    size = U * SECOND_ORDER * (wide.abs() @ rows.abs().T)
    if x.is_cuda:
        error = min(hidden, -(-hidden // 256) + 17) * size
    else:
        terms = wide[:, None] * rows
        error = size + torch.stack([lanes_bound(terms, lanes) for lanes in (4, 8, 16)]).amax(
            0
        )  # products are rounded too
    return rounded(wide @ rows.T, error, router.dtype)


# ---- products --------------------------------------------------------------------------------------------------------


def chains_bound(a: Tensor, b: Tensor, rounded_products: bool) -> Tensor:
    """f64 a [M,Kdim], b [N,Kdim] -> [M,N]: chains of 256 products, added up in order. Every partial sum is rounded."""
    sizes = a.abs() @ b.abs().T if rounded_products else a.new_zeros(len(a), len(b))
    rows = max(1, 2**13 // max(1, len(b)))
    for size, part in zip(sizes.split(rows), a.split(rows), strict=True):
        total = torch.zeros_like(size)
        for k in range(0, a.shape[1], 256):
            chain = (part[:, None, k : k + 256] * b[None, :, k : k + 256]).cumsum(-1)
            total += chain[..., -1]
            size += chain.abs().sum(-1) + (total.abs() if k > 0 else 0)
    return U * SECOND_ORDER * sizes


def product_bound(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """f64 a [M,Kdim], b [N,Kdim] -> [M,N]: of the f32 sums that grouped_gemm makes of inputs of ``dtype``."""
    if dtype != torch.bfloat16:
        return chains_bound(a, b, rounded_products=dtype == torch.float32)
    # Every instruction set has its own order for bf16: the largest number of roundings that a product goes through.
    depth = a.shape[1]
    chains, amx = min(depth, 256) + -(-depth // 256) - 1, 16 + -(-depth // 32)
    return min(depth, max(chains, amx)) * U * SECOND_ORDER * (a.abs() @ b.abs().T)


def sums_bound(a: Tensor, b: Tensor, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """f64 a [M,Kdim], b [E,N,Kdim] -> [M,N]: before the result of grouped_gemm is rounded to ``dtype``."""
    starts = [0, *offs.tolist()]
    return torch.cat([product_bound(a[starts[e] : starts[e + 1]], b[e], dtype) for e in range(len(b))])


def grouped_gemm_bound(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    wide = a.double(), b.double(), offs
    return rounded(reference.grouped_gemm(*wide), sums_bound(*wide, a.dtype), a.dtype)


def grouped_gemm_backward_input_bound(grad: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return grouped_gemm_bound(grad, b.mT, offs)


def grouped_gemm_backward_weight_bound(grad: Tensor, a: Tensor, offs: Tensor) -> Tensor:
    starts = [0, *offs.tolist()]
    groups = [slice(starts[e], starts[e + 1]) for e in range(len(offs))]
    error = torch.stack([product_bound(grad[g].double().T, a[g].double().T, grad.dtype) for g in groups])
    return rounded(reference.grouped_gemm_backward_weight(grad.double(), a.double(), offs), error, grad.dtype)


def int8_gemm_bound(a: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """With int8 weights on the CPU, given as what they stand for in f64: a finished sum is multiplied by its scale."""
    out = reference.grouped_gemm(a.double(), weight, offs)
    return rounded(out, sums_bound(a.double(), weight, offs, a.dtype) + U * SECOND_ORDER * out.abs(), a.dtype)


def moe_unpermute_bound(
    y: Tensor, topk_weights: Tensor, row_map: Tensor, inherited: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``inherited``: the error of y itself, then in f64; ``dtype``: of the result."""
    wide, weights = y.double(), topk_weights.double()
    size = reference.moe_unpermute(wide.abs(), weights.abs(), row_map)
    before = torch.zeros_like(size) if inherited is None else reference.moe_unpermute(inherited, weights.abs(), row_map)
    sums = row_map.shape[1] * U * (size + before)
    out = reference.moe_unpermute(wide, weights, row_map)
    return rounded(out, (before + sums) * SECOND_ORDER, dtype or y.dtype)


def moe_mlp_bound(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    dtype, gate_up, down = x.dtype, gate_up.double(), down.double()
    rows, offs, row_map = reference.moe_permute(x.double(), topk_ids, len(gate_up))
    product = reference.grouped_gemm(rows, gate_up, offs)
    product_error = rounded(product, sums_bound(rows, gate_up, offs, dtype), dtype)
    activated, activated_error = reference.swiglu(product), swiglu_bound(product, product_error, dtype)
    y = reference.grouped_gemm(activated, down, offs)
    inherited = reference.grouped_gemm(activated_error, down.abs(), offs) * SECOND_ORDER
    y_error = rounded(y, inherited + sums_bound(activated, down, offs, dtype), dtype)
    return moe_unpermute_bound(y, topk_weights, row_map, y_error, dtype)


# ---- attention -------------------------------------------------------------------------------------------------------


def _masked_attention_bound(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, dtype: torch.dtype
) -> Tensor:
    """f64 [Lq,Nq,D], [Lk,Nkv,D], mask [Lq,Lk] -> [Lq,Nq,D], for an op with inputs of ``dtype``."""
    (_, heads, depth), out = q.shape, torch.zeros_like(q)
    if mask.numel() == 0:
        return out
    scale = depth**-0.5 if scale is None else scale
    cuda, block = q.is_cuda, 32 if q.is_cuda else 64
    keys = mask.sum(-1, keepdim=True)
    later_blocks = (keys + block - 2).clamp(min=0) // block  # each may raise the maximum and rescale the sums
    # f32: scores are sums of eight products, added up. bf16, CUDA: one chain.
    score_roundings = depth if cuda or dtype == torch.bfloat16 else min(depth, 7 + -(-depth // 8))
    value_roundings = (keys if cuda else keys.clamp(max=block)) + 2 * later_blocks
    weight_roundings = 10 + 2 * later_blocks
    for h in range(heads):
        keys_h, values = k[:, h * k.shape[1] // heads], v[:, h * v.shape[1] // heads]
        scores, sizes = q[:, h] @ keys_h.T * scale, q[:, h].abs() @ keys_h.abs().T * abs(scale)
        seen = scores.masked_fill(~mask, -torch.inf)
        below = (seen.amax(-1, keepdim=True) - scores).masked_fill(~mask, 0.0)
        p = seen.softmax(-1).masked_fill(~mask, 0.0)
        exact = p @ values
        # A weight is a product of exponentials, whose arguments add up to its distance from the maximum.
        score_error = score_roundings * U * sizes + 2 * U * scores.abs()
        weight_error = torch.expm1(score_error + U * below + EXP * (1 + later_blocks)) * mask
        if dtype == torch.bfloat16:
            weight_error = weight_error + half_ulp(
                torch.ones((), dtype=torch.float64), dtype
            )  # rounded for the product
        # The same weights are in the sum of values and in the sum by which it is divided: an error of one moves the
        # result along the way to its value.
        rows = zip((p * weight_error)[..., None], exact, strict=True)
        moved = torch.stack([(error * (values - mean).abs()).sum(0) for error, mean in rows])
        sums = value_roundings * U * (p @ values.abs()) + (weight_roundings + 2) * U * exact.abs()
        vanished = TINY * values.abs().sum(0)  # weights below f32's normal numbers may be zero
        error = (moved + sums) * SECOND_ORDER / (1 - 3 * weight_error.amax(-1, keepdim=True)) + vanished
        out[:, h] = rounded(exact, error, dtype)
    return torch.where((keys > 0)[..., None], out, 0.0)  # without keys: zeros, exactly


def _attention_bound(attention: Callable, q: Tensor, k: Tensor, v: Tensor, *options, **named) -> Tensor:
    """The reference gathers the keys of every sequence; the bound takes the place of the attention to them."""

    def bound(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        return _masked_attention_bound(q, k, v, mask, scale, dtype)

    dtype = q.dtype
    with mock.patch.object(reference, "_masked_attention", bound):
        return attention(q.double(), k.double(), v.double(), *options, **named)


sliding_window_attention_bound = partial(_attention_bound, reference.sliding_window_attention)
rolling_kv_cache_attention_bound = partial(_attention_bound, reference.rolling_kv_cache_attention)


def sliding_window_attention_backward_bound(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradients of q, k and v, from the results of the op's own forward pass."""
    dtype, options = q.dtype, (cu_seqlens_q, cu_seqlens_k, window, causal, scale)
    out_error = sliding_window_attention_bound(q, k, v, *options)
    grad, q, k, v = (x.double() for x in (grad, q, k, v))
    out, lse = reference.sliding_window_attention_for_backward(q, k, v, *options)
    exact = reference.sliding_window_attention_backward(grad, q, k, v, out, lse, *options)
    depth, heads, group, scale = q.shape[2], q.shape[1], q.shape[1] // k.shape[1], reference._scale(q, scale)
    # bf16: weights and their gradients are rounded for the products.
    operand = half_ulp(torch.ones((), dtype=torch.float64), dtype) if dtype == torch.bfloat16 else 0.0
    errors = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys, mask in reference._sequences(q, k, cu_seqlens_q, cu_seqlens_k, window, causal):
        if mask.numel() == 0:
            continue
        count = mask.shape[1] + mask.shape[0] * group  # no sum has more terms
        for h in range(heads):
            rows_q, rows_grad, keys_h, values = q[rows, h], grad[rows, h], k[keys, h // group], v[keys, h // group]
            scores, sizes = rows_q @ keys_h.T * scale, rows_q.abs() @ keys_h.abs().T * abs(scale)
            row_lse = torch.where(mask.any(-1), lse[h, rows], 0.0)[:, None]
            score_error = (depth * U * sizes + 2 * U * (scores.abs() + row_lse.abs())) * mask
            below = (row_lse - scores).abs() * mask
            # lse: every weight of the row may be off, and the sum and its logarithm are rounded.
            lse_error = (score_error + U * below).amax(-1, keepdim=True) + (count + 8) * (U + EXP) + operand
            lse_error = lse_error + 2 * U * row_lse.abs()
            p = torch.where(mask, torch.exp(scores - row_lse), 0.0)
            p_error = p * (torch.expm1(score_error + lse_error + U * below + EXP) + operand) + TINY * mask
            slope = rows_grad @ values.T - (rows_grad * out[rows, h]).sum(-1, keepdim=True)
            slope_error = depth * U * rows_grad.abs() @ values.abs().T + U * slope.abs()
            dot_error = rows_grad.abs() * (depth * U * out[rows, h].abs() + out_error[rows, h])
            slope_error = slope_error + dot_error.sum(-1, keepdim=True)
            ds = p * slope
            ds_error = p_error * (slope.abs() + slope_error) + p * slope_error + (operand + 2 * U) * ds.abs()
            errors[0][rows, h] = abs(scale) * (ds_error + count * U * ds.abs()) @ keys_h.abs()
            errors[1][keys, h // group] += abs(scale) * (ds_error + count * U * ds.abs()).T @ rows_q.abs()
            errors[2][keys, h // group] += (p_error + count * U * p).T @ rows_grad.abs()
    results = zip(exact, errors, strict=True)
    return tuple(rounded(x, (error + 2 * U * x.abs()) * SECOND_ORDER, dtype) for x, error in results)
