"""What all tests share: devices, dtypes, and the one table of tolerances."""

import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach out
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin ruin each other on a busy machine

import pytest
import torch
from torch import Tensor

import error_bounds as bounds
from mixtral import reference
from routing_bounds import router_losses_bound

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Op -> how far each element of its results may be from the f64 reference; None: the result is exact.
TOLERANCES: dict[str, Callable] = {
    "rms_norm": bounds.rms_norm_bound,
    "rms_norm_backward": bounds.rms_norm_backward_bound,
    "add_rms_norm_backward": bounds.add_rms_norm_backward_bound,
    "rope": bounds.rope_bound,
    "rope_backward": bounds.rope_bound,  # of the gradients: it is a rotation too
    "swiglu": bounds.swiglu_bound,
    "swiglu_backward": bounds.swiglu_backward_bound,
    "topk_softmax": lambda *arguments: (bounds.topk_softmax_bound(*arguments), None),
    "router_losses": router_losses_bound,
    "grouped_gemm": bounds.grouped_gemm_bound,
    "grouped_gemm_backward_input": bounds.grouped_gemm_backward_input_bound,
    "grouped_gemm_backward_weight": bounds.grouped_gemm_backward_weight_bound,
    "moe_unpermute": bounds.moe_unpermute_bound,
    "moe_mlp": bounds.moe_mlp_bound,
    "sliding_window_attention": bounds.sliding_window_attention_bound,
    "rolling_kv_cache_attention": bounds.rolling_kv_cache_attention_bound,
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def share_of_bound(actual: Tensor, oracle: Tensor, bound: Tensor, plain: Callable[[], Tensor] | None = None) -> float:
    """The largest error of ``actual`` against the f64 ``oracle``, as a share of what is allowed there: ``bound``.

    On CUDA twice the largest error of plain PyTorch in the same dtype, ``plain()``, is allowed as well: the order in
    which tensor cores add is not documented.
    """
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if actual.is_cuda and plain is not None and oracle.numel() > 0:
        bound = bound.clamp(min=2 * (plain().double() - oracle).abs().max().item())
    error = (actual.double() - oracle).abs()
    shares = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=torch.inf)
    return shares.max().item() if shares.numel() > 0 else 0.0


def share_of_tolerance(op: str, actual: Tensor | tuple[Tensor, ...], *arguments) -> float:
    """The same for results of ``op``, by its reference and the table of tolerances."""
    function = getattr(reference, op)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    oracles, allowed = function(*wide), TOLERANCES[op](*arguments)
    if isinstance(actual, Tensor):
        return share_of_bound(_of_dtype(op, actual, arguments), oracles, allowed, lambda: function(*arguments))
    share = 0.0
    for i, (result, oracle, bound) in enumerate(zip(actual, oracles, allowed, strict=True)):
        if bound is None:
            assert torch.equal(result, oracle), f"{op}: result {i} differs, which must be exact"
        else:
            plain = partial(lambda i: function(*arguments)[i], i)
            share = max(share, share_of_bound(_of_dtype(op, result, arguments), oracle, bound, plain))
    return share


def _of_dtype(op: str, result: Tensor, arguments: tuple) -> Tensor:
    expected = torch.float32 if op in ("topk_softmax", "router_losses") else arguments[0].dtype
    assert result.dtype == expected, f"{op}: dtype {result.dtype}, expected {expected}"
    return result


def assert_within_tolerance(op: str, actual: Tensor | tuple[Tensor, ...], *arguments) -> None:
    share = share_of_tolerance(op, actual, *arguments)
    assert share <= 1, f"{op}: error {share:.3g} times what is allowed"


def assert_within_bound(
    actual: Tensor, oracle: Tensor, bound: Tensor, plain: Callable[[], Tensor] | None = None
) -> None:
    share = share_of_bound(actual, oracle, bound, plain)
    assert share <= 1, f"error {share:.3g} times what is allowed"


def assert_route_within_tolerance(
    actual: tuple[Tensor, Tensor], x: Tensor, router: Tensor, top_k: int, renormalize: bool = True
) -> Tensor:
    """Weights and ids of moe_route. Returns, bool [T], the rows whose choice no rounding of the logits can change."""
    weights, ids = actual
    logits, error = x.double() @ router.double().T, bounds.route_logits_bound(x, router)
    oracle_weights, oracle_ids = reference.topk_softmax(logits, top_k, renormalize)
    best = logits.sort(dim=-1, descending=True).values[:, : top_k + 1]
    decided = (best.diff(dim=-1).neg() > 2 * error.amax(-1, keepdim=True)).all(-1)
    assert torch.equal(ids[decided], oracle_ids[decided])
    alike = (ids == oracle_ids).all(-1)
    allowed = bounds.topk_softmax_bound(logits, top_k, renormalize, error)
    assert_within_bound(weights[alike], oracle_weights[alike], allowed[alike])
    return decided


def int8_weight(packed: torch.Tensor) -> torch.Tensor:
    """f64 [E, N, Kdim]: what unpack_weight rounds to bf16."""
    scales = packed[..., -128:].contiguous().view(torch.float32)
    ones = packed.clone()  # unpacked, the same q at a scale of one
    ones[..., -128:] = torch.ones_like(scales).view(torch.int8)
    return torch.ops.mixtral.unpack_weight(ones).double() * scales.flatten(1)[..., None].double()


def near(actual: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    """Whether the norm of the difference is at most this share of that of ``expected``; False with NaN or inf."""
    return bool((actual.double() - expected.double()).norm() <= share * expected.double().norm())


def assert_same_product(actual: torch.Tensor, expected: torch.Tensor, float8: bool = False) -> None:
    """The same bits, but where Hopper kernels may have computed the two with different instructions.

    The PTX ISA does not say in which order, nor how exactly, wgmma adds. A sum on the edge between two bf16 values may
    then go to either, a 2^7th of itself apart. Of products of e4m3 (``float8``) tensor cores keep
    fewer bits than f32: far from the error of rounding to e4m3, some 2.6 %.
    """
    if actual.is_cuda and os.environ.get("MIXTRAL_CUDA_KERNELS") == "hopper":
        assert near(actual, expected, 2**-6 if float8 else 2**-7)
    else:
        assert torch.equal(actual, expected)


def opcheck(op: torch._ops.OpOverload, args: tuple, kwargs: dict | None = None, float8: bool = False) -> None:
    """Schema, autograd registration, fake kernel and AOT dispatch of ``op`` on these arguments.

    The check of the schema uses ``torch.allclose``, which takes no 8-bit floats: with ``float8`` it is left out.
    """
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, args, kwargs or {}, test_utils=checks[1:] if float8 else checks)


def pack(weight: torch.Tensor, quantize: str | None = None) -> torch.Tensor:
    """``weight`` packed, on its own device: packing is done on the CPU."""
    return torch.ops.mixtral.pack_weight(weight.cpu(), quantize).to(weight.device)


def with_threads(count: int, function):
    """``function()`` under ``torch.set_num_threads(count)``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)
