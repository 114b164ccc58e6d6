"""The mathematics of every op in plain PyTorch, written to be read.

Each function takes the arguments of the op of the same name, on any device and in any float dtype including f64, and
computes in the dtype it is given: in f64 it is the oracle of the tests, in bf16 or f16 the "plain PyTorch" whose error
the op is compared with. Nothing here is fast.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T,H] -> [T,H]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T,H], [T,H], [H] -> grad_x [T,H], grad_weight [H]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    normed, upper = x.to(wide) * scale, grad.to(wide) * weight.to(wide)
    grad_x = scale * (upper - normed * (upper * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad.to(wide) * normed).sum(0).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T,H], [T,H] -> normed [T,H], sum [T,H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, sum: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """[T,H], [T,H] (None: zero), [T,H], [H] -> grad_x [T,H], of x and of residual, grad_weight [H]."""
    grad_x, grad_weight = rms_norm_backward(grad_normed, sum, weight, eps)
    return grad_x if grad_sum is None else grad_x + grad_sum, grad_weight


def topk_softmax(
    router_logits: Tensor, top_k: int, renormalize: bool = True, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[T,E], [E] -> weights [T,K] in at least f32, ids int32 [T,K]."""
    wide = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    scores = wide if select_bias is None else wide.softmax(-1) + select_bias
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = wide.softmax(-1).gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.int()


def topk_softmax_backward(
    grad: Tensor, router_logits: Tensor, topk_weights: Tensor, topk_ids: Tensor, renormalize: bool = True
) -> Tensor:
    """[T,K], [T,E], [T,K], [T,K] -> [T,E]."""
    ids, mean = topk_ids.long(), (grad * topk_weights).sum(-1, keepdim=True)
    chosen = topk_weights * (grad - mean)
    if renormalize:
        out = torch.zeros_like(router_logits, dtype=chosen.dtype).scatter(1, ids, chosen)
    else:
        p = router_logits.to(chosen.dtype).softmax(-1)
        out = p * (torch.zeros_like(p).scatter(1, ids, grad) - mean)
    return out.to(router_logits.dtype)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """[T,H], [E,H] -> [T,E] in at least f32, rounded to the router's dtype."""
    return (x.to(router.dtype) @ router.T).to(torch.promote_types(router.dtype, torch.float32))


def router_logits_backward(grad: Tensor, x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """[T,E], [T,H], [E,H] -> [T,H], [E,H]."""
    return (grad @ router.to(grad.dtype)).to(x.dtype), (grad.T @ x.to(grad.dtype)).to(router.dtype)


def moe_route(
    x: Tensor, router: Tensor, top_k: int, renormalize: bool = True, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[T,H], [E,H], [E] -> weights [T,K] in at least f32, ids int32 [T,K]; the logits have the router's dtype."""
    return topk_softmax(router_logits(x, router), top_k, renormalize, select_bias)


def moe_route_backward(
    grad: Tensor, x: Tensor, router: Tensor, topk_weights: Tensor, topk_ids: Tensor, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """[T,K], [T,H], [E,H], [T,K], [T,K] -> [T,H], [E,H]."""
    logits = router_logits(x, router)
    return router_logits_backward(topk_softmax_backward(grad, logits, topk_weights, topk_ids, renormalize), x, router)


def router_losses(
    router_logits: Tensor, topk_ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T,E], [T,K], bool [T] -> load int64 [E], prob_sum [E], z_sum [], count int64 []; masked rows are left out."""
    wide = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if mask is not None:
        wide, topk_ids = wide[mask], topk_ids[mask]
    load = topk_ids.flatten().long().bincount(minlength=wide.shape[1])
    count = torch.tensor(len(wide), device=wide.device)
    return load, wide.softmax(-1).sum(0), wide.logsumexp(-1).square().sum(), count


def router_losses_backward(
    grad_prob_sum: Tensor, grad_z_sum: Tensor, router_logits: Tensor, mask: Tensor | None = None
) -> Tensor:
    """[E], [], [T,E], bool [T] -> [T,E]; zeros in masked rows."""
    out = torch.zeros_like(router_logits)
    mask = torch.ones(len(out), dtype=torch.bool, device=out.device) if mask is None else mask
    wide = router_logits[mask].to(grad_prob_sum.dtype)
    p, lse = wide.softmax(-1), wide.logsumexp(-1, keepdim=True)
    balance = grad_prob_sum - (p * grad_prob_sum).sum(-1, keepdim=True)
    out[mask] = (p * (balance + 2 * grad_z_sum * lse)).to(out.dtype)
    return out


def moe_permute(x: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T,H], [T,K] -> permuted [M,H], end offsets int32 [E], row_map int32 [T,K]."""
    copies = topk_ids.flatten().long()
    copies = torch.where(copies < 0, num_experts, copies)  # the dropped ones go behind all others
    order = copies.argsort(stable=True)
    row_map = torch.empty_like(copies)
    row_map[order] = torch.arange(len(order), device=x.device)
    kept = copies < num_experts
    offs = copies[kept].bincount(minlength=num_experts).cumsum(0)
    permuted = torch.where(kept[order, None], x[order // topk_ids.shape[1]], 0)
    return permuted, offs.int(), torch.where(kept, row_map, -1).reshape(topk_ids.shape).int()


def moe_permute_backward(grad: Tensor, row_map: Tensor) -> Tensor:
    """[M,H], [T,K] -> [T,H]."""
    return moe_unpermute(grad, torch.ones(row_map.shape, device=grad.device), row_map)


def moe_unpermute(y: Tensor, topk_weights: Tensor, row_map: Tensor) -> Tensor:
    """[M,H], [T,K], [T,K] -> [T,H]."""
    wide = torch.promote_types(y.dtype, torch.float32)
    copies = torch.where(row_map[..., None] >= 0, y[row_map.long()], 0).to(wide)
    return (topk_weights[..., None].to(wide) * copies).sum(1).to(y.dtype)


def moe_unpermute_backward(grad: Tensor, y: Tensor, topk_weights: Tensor, row_map: Tensor) -> tuple[Tensor, Tensor]:
    """[T,H], [M,H], [T,K], [T,K] -> [M,H], [T,K]."""
    wide = torch.promote_types(y.dtype, torch.float32)
    kept, rows, grads = row_map >= 0, row_map.long(), grad[:, None].to(wide)
    grad_y = torch.zeros_like(y)
    grad_y[rows[kept]] = (topk_weights[..., None].to(wide) * grads)[kept].to(y.dtype)
    dots = (grads * torch.where(kept[..., None], y[rows], 0).to(wide)).sum(-1)
    return grad_y, dots.to(topk_weights.dtype)


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """[M,Kdim], [E,N,Kdim], end offsets [E] -> [M,N]."""
    starts = [0, *offs.tolist()]
    return torch.cat([a[starts[e] : starts[e + 1]] @ b[e].T for e in range(len(b))])


def grouped_gemm_backward_input(grad: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """grad [M,N], [E,N,Kdim], end offsets [E] -> [M,Kdim]."""
    starts = [0, *offs.tolist()]
    return torch.cat([grad[starts[e] : starts[e + 1]] @ b[e] for e in range(len(b))])


def grouped_gemm_backward_weight(grad: Tensor, a: Tensor, offs: Tensor) -> Tensor:
    """grad [M,N], a [M,Kdim], end offsets [E] -> [E,N,Kdim]; zeros for an expert without rows."""
    starts = [0, *offs.tolist()]
    rows = [slice(starts[e], starts[e + 1]) for e in range(len(offs))]
    return torch.stack([grad[r].T @ a[r] for r in rows])


def swiglu(gate_up: Tensor) -> Tensor:
    """[M,2I] -> [M,I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """[M,I], [M,2I] -> [M,2I]."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    grad_gate, grad_up = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    return torch.cat((grad_gate, grad_up), -1).to(gate_up.dtype)


def moe_mlp(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """[T,H], [T,K], [T,K], [E,2I,H], [E,H,I] -> [T,H]."""
    permuted, offs, row_map = moe_permute(x, topk_ids, len(gate_up_proj))
    activated = swiglu(grouped_gemm(permuted, gate_up_proj, offs))
    return moe_unpermute(grouped_gemm(activated, down_proj, offs), topk_weights, row_map)


def moe_mlp_backward(
    grad: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [T,H] and the arguments of moe_mlp -> gradients of x, topk_weights, gate_up_proj, down_proj."""
    permuted, offs, row_map = moe_permute(x, topk_ids, len(gate_up_proj))
    upper = moe_permute(grad, topk_ids, len(gate_up_proj))[0]
    gate_up = grouped_gemm(permuted, gate_up_proj, offs)
    activated = swiglu(gate_up)
    weights = topk_weights.flatten()[row_map.flatten().argsort()][:, None]  # of each row
    product = grouped_gemm_backward_input(upper, down_proj, offs)
    grad_gate_up = swiglu_backward((weights * product).to(x.dtype), gate_up)
    copies = grouped_gemm_backward_input(grad_gate_up, gate_up_proj, offs)
    return (
        moe_unpermute(copies, torch.ones_like(topk_weights), row_map),
        (product.to(weights.dtype) * activated).sum(-1)[row_map.long()],
        grouped_gemm_backward_weight(grad_gate_up, permuted, offs),
        grouped_gemm_backward_weight(upper, (weights * activated).to(x.dtype), offs),
    )


def _pair_order(rows: Tensor) -> Tensor:
    """[E,N,Kdim] -> [E,N/32,Kdim/32,1024]: two neighbouring depths of a row side by side, 16 rows at a time."""
    experts, columns, depth = rows.shape
    split = rows.reshape(experts, columns // 32, 2, 16, depth // 32, 16, 2)  # block, half, row, step, pair, depth
    return split.permute(0, 1, 4, 2, 5, 3, 6).reshape(experts, columns // 32, depth // 32, 1024)


def _from_pair_order(steps: Tensor) -> Tensor:
    """The inverse of ``_pair_order``."""
    experts, blocks, count, _ = steps.shape
    split = steps.reshape(experts, blocks, count, 2, 16, 16, 2)  # block, step, half, pair, row, depth
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(experts, blocks * 32, count * 32)


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[E,N,Kdim] -> q [E,N,Kdim], f32 scales [E,N,1]: the value of largest magnitude becomes 127 or -127."""
    scales = (weight.float().abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scales).round().clamp(-127, 127), scales


def _quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[...,Kdim] -> e4m3, f32 scales [...,1]: the least powers of two that keep a row within 448 = 1.75 * 2^8."""
    fraction, exponent = torch.frexp(weight.float().abs().amax(-1, keepdim=True))  # fraction in [1/2, 1)
    exponent = torch.where(fraction == 0, -117, exponent - 9 + (fraction > 1.75 / 2).int())
    scales = torch.ldexp(torch.ones_like(fraction), exponent.clamp(min=-117))
    return (weight.float() / scales).to(torch.float8_e4m3fn), scales


def round_rows_to_e4m3(a: Tensor) -> Tensor:
    """[M,Kdim] -> [M,Kdim]: the rows of a product with an fp8 weight; NaN throughout where a row has inf or NaN."""
    values, scales = _quantize_fp8(a)
    return (values.float() * scales).masked_fill(~a.isfinite().all(-1, keepdim=True), torch.nan).to(a.dtype)


def _int4_scale(byte: Tensor) -> tuple[Tensor, Tensor]:
    """The scale that a byte means, as a factor, 1 or the square root of two, and the exponent of a power of two."""
    return torch.where(byte % 2 == 1, 2**0.5, 1.0).float(), byte.int() // 2 - 64


def _quantize_int4(weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """[E,N,Kdim] -> q + 8 [E,N,Kdim/32,32], bytes of scales [E,N,Kdim/32]: of three scales the one of least error."""
    groups = weight.float().unflatten(-1, (-1, 32))
    fraction, exponent = torch.frexp(groups.abs().amax(-1) / 7.5)
    covering = 2 * (exponent + 64) - (fraction <= torch.tensor(2**0.5).float() / 2).int()
    covering = torch.where(fraction == 0, 0, covering).clamp(0, 255)

    def at(byte: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.ldexp(*_int4_scale(byte))[..., None]
        levels = (torch.floor(groups * (1 / scale)) + 8).clamp(0, 15)
        return levels, (groups.double() - scale.double() * (levels - 7.5)).square().sum(-1)

    if scales is not None:
        return at(scales)[0], scales
    best, (levels, error) = covering, at(covering)
    for smaller in (covering - 1, covering - 2):
        smaller_levels, smaller_error = at(smaller.clamp(min=0))
        better = (smaller >= 0) & (smaller_error < 0.999999 * error)
        best, error = torch.where(better, smaller, best), torch.where(better, smaller_error, error)
        levels = torch.where(better[..., None], smaller_levels, levels)
    return levels, best.to(torch.uint8)


def pack_weight(weight: Tensor, quantize: str | None = None, scales: Tensor | None = None) -> Tensor:
    """[E,N,Kdim] -> packed: the layout of csrc/ops/pack_weight/pack_weight.h, byte for byte."""
    experts, columns, depth = weight.shape
    if quantize == "int8":
        q, scales = _quantize_int8(weight)
        values = _pair_order(q).to(torch.int8).reshape(experts, columns // 32, 32 * depth)
        return torch.cat((values, scales.reshape(experts, columns // 32, 32).view(torch.int8)), -1)
    if quantize == "fp8":
        values, scales = _quantize_fp8(weight)
        rows, scales = (x.contiguous().view(torch.uint8).reshape(experts, columns // 32, -1) for x in (values, scales))
        return torch.cat((rows, scales), -1).view(torch.float8_e4m3fn)
    if quantize == "int4":
        levels, scales = _quantize_int4(weight, scales)
        # block, step, half, group of pairs, pair, word: nibble `pair` of a word is in byte pair // 2, low half first
        words = _pair_order(levels.flatten(2)).to(torch.uint8).unflatten(-1, (2, 4, 2, 2, 32))
        values = (words[..., 0, :] + 16 * words[..., 1, :]).mT.flatten(3)
        return torch.cat((scales.unflatten(1, (-1, 32)).mT, values), -1)
    if weight.dtype == torch.bfloat16:
        return _pair_order(weight)
    split = weight.reshape(experts, columns // 32, 32, depth // 32, 32)  # block, row, step, depth
    return split.permute(0, 1, 3, 4, 2).reshape(experts, columns // 32, depth // 32, 1024)


def unpack_weight(packed: Tensor) -> Tensor:
    """packed -> [E,N,Kdim]; bf16 when quantised."""
    experts, blocks = packed.shape[:2]
    if packed.dtype == torch.int8:
        values, scales = packed[..., :-128], packed[..., -128:].contiguous().view(torch.float32)
        q = _from_pair_order(values.reshape(experts, blocks, -1, 1024))
        return (q * scales.reshape(experts, blocks * 32, 1)).bfloat16()
    if packed.dtype == torch.float8_e4m3fn:
        values, scales = packed.view(torch.uint8).split((packed.shape[2] - 128, 128), -1)
        rows = values.contiguous().view(torch.float8_e4m3fn).float().reshape(experts, blocks * 32, -1)
        return (rows * scales.contiguous().view(torch.float32).reshape(experts, blocks * 32, 1)).bfloat16()
    count = packed.shape[2]
    if packed.dtype == torch.uint8:
        factor, exponent = _int4_scale(packed[..., :32].mT.reshape(experts, blocks * 32, count, 1))
        values = packed[..., 32:].unflatten(-1, (2, 4, 32, 2)).mT  # block, step, half, group of pairs, byte, word
        levels = torch.stack((values & 15, values >> 4), -2).reshape(experts, blocks, count, 1024)
        rows = (_from_pair_order(levels).float() - 7.5).unflatten(-1, (-1, 32))
        return torch.ldexp((rows * factor).bfloat16().float(), exponent).bfloat16().flatten(2)
    if packed.dtype == torch.bfloat16:
        return _from_pair_order(packed)
    split = packed.reshape(experts, blocks, count, 32, 32)  # block, step, depth, row
    return split.permute(0, 1, 4, 2, 3).reshape(experts, blocks * 32, count * 32)


def rope(q: Tensor, k: Tensor, positions: Tensor, theta: float, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """[T,Nq,D], [T,Nkv,D], [T] -> q, k rotated. The angles are f32 products in every dtype, by definition."""
    head_dim = q.shape[-1]
    exponents = torch.arange(0, head_dim, 2, device=q.device).float() / head_dim
    inverse_frequency = 1.0 / (torch.tensor(theta).double() ** exponents.double()).float()
    angles = (positions.float()[:, None] * inverse_frequency).to(torch.promote_types(q.dtype, torch.float32))
    cosine, sine = angles.cos().to(q.dtype)[:, None], angles.sin().to(q.dtype)[:, None]  # [T, 1, D/2]

    def rotate(x: Tensor) -> Tensor:
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        pair = (a * cosine - b * sine, b * cosine + a * sine)
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    return rotate(q), rotate(k)


def rope_backward(
    grad_q: Tensor, grad_k: Tensor, positions: Tensor, theta: float, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """[T,Nq,D], [T,Nkv,D], [T] -> both rotated back."""
    return rope(grad_q, grad_k, -positions, theta, interleaved)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """[Lq,Nq,D], [Lk,Nkv,D], mask [Lq,Lk] -> [Lq,Nq,D]; zeros where a row of the mask is empty."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * _scale(q, scale)
    weights = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.einsum("hij,jhd->ihd", weights.to(q.dtype), v)


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[Lq,Lk]: query i, at position i + Lk - Lq, sees key j if and only if 0 <= position - j < window."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & ((distance < window) | (window == 0))


def _sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int, causal: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each sequence: rows of q, rows of k, mask [Lq,Lk]."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        queries, length = len(q[rows]), len(k[keys])
        yield rows, keys, _window_mask(queries, length, window, q.device) if causal else q.new_ones(queries, length) > 0


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """[Tq,Nq,D], [Tk,Nkv,D], [B+1], [B+1] -> [Tq,Nq,D]: dense masked attention, one sequence after the other."""
    out = torch.zeros_like(q)
    for rows, keys, mask in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, window, causal):
        out[rows] = _masked_attention(q[rows], k[keys], v[keys], mask, scale)
    return out


def sliding_window_attention_for_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same -> out [Tq,Nq,D], lse [Nq,Tq]: log of the sum of exp of a query's scores, -inf if it sees no key."""
    lse = q.new_zeros(q.shape[1], q.shape[0])
    for rows, keys, mask in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, window, causal):
        for h in range(q.shape[1]):
            scores = q[rows, h] @ k[keys, h * k.shape[1] // q.shape[1]].T * _scale(q, scale)
            lse[h, rows] = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return sliding_window_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal, scale), lse


def sliding_window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[Tq,Nq,D], then the tensors of the forward pass -> gradients of q, k and v (Dao, FlashAttention-2, alg. 2)."""
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = _scale(q, scale)
    for rows, keys, mask in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, window, causal):
        for h in range(q.shape[1]):
            h_k = h * k.shape[1] // q.shape[1]
            p = torch.where(mask, torch.exp(scale * q[rows, h] @ k[keys, h_k].T - lse[h, rows, None]), 0)
            dot = (grad[rows, h] * out[rows, h]).sum(-1, keepdim=True)
            ds = torch.where(mask, p * (grad[rows, h] @ v[keys, h_k].T - dot), 0)
            grad_q[rows, h] = scale * ds @ k[keys, h_k]
            grad_k[keys, h_k] += scale * ds.T @ q[rows, h]
            grad_v[keys, h_k] += p.T @ grad[rows, h]
    return grad_q, grad_k, grad_v


def rolling_kv_cache_write(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """caches [pages,P,Nkv,D], [T,Nkv,D], [T]: in place."""
    k_cache.flatten(0, 1)[slot_mapping.long()] = k
    v_cache.flatten(0, 1)[slot_mapping.long()] = v


def rolling_kv_cache_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """[T,Nq,D], [T,Nkv,D], [T,Nkv,D], [T], caches [pages,P,Nkv,D] in place, [T] -> q rotated [T,Nq,D]."""
    q, k = rope(q, k, positions, theta)
    rolling_kv_cache_write(k_cache, v_cache, k, v, slot_mapping)
    return q


def rolling_kv_cache_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """[T,Nq,D], caches [pages,P,Nkv,D], [B,R], [B+1], [B] -> [T,Nq,D]: gather the keys, then dense attention."""
    out = torch.zeros_like(q)
    page_size, columns = k_cache.shape[1], page_table.shape[1]
    starts = cu_seqlens_q.tolist()
    for b, length in enumerate(kv_lens.tolist()):
        rows = slice(*starts[b : b + 2])
        queries = q[rows].shape[0]
        first = max(0, length - queries - window + 1) if window else 0  # the oldest key that any query sees
        position = torch.arange(first, length if queries else first, device=q.device)
        page = page_table[b, (position // page_size) % columns].long()
        k, v = k_cache[page, position % page_size], v_cache[page, position % page_size]
        out[rows] = _masked_attention(q[rows], k, v, _window_mask(queries, len(position), window, q.device), scale)
    return out
