"""What all tests share: devices, dtypes, and the one table of tolerances."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach out
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin ruin each other on a busy machine

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Where the plain PyTorch result happens to be exact, an op may still be off by this many units in the last place.
ULPS_WHEN_BASELINE_IS_EXACT = 1


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_within_twice_baseline(
    actual: torch.Tensor, oracle: torch.Tensor, baseline: torch.Tensor, roundings: int = 0
) -> None:
    """The project's tolerance: max error <= 2 x the error of plain PyTorch in the same dtype, both against f64.

    ``oracle`` is f64, ``baseline`` the reference computed in the dtype of ``actual``. A rounding of the largest value
    in the oracle is always allowed (FlashAttention's rule has the same floor). ``roundings`` more of them are allowed
    on top for tests of many small cases, where the error of the baseline is sometimes small by luck.
    """
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == baseline.dtype, f"dtype {actual.dtype}, expected {baseline.dtype}"
    if oracle.numel() == 0:
        return
    error = (actual.double() - oracle).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * oracle.abs().max().item()
    allowed = 2 * (baseline.double() - oracle).abs().max().item() + roundings * rounding
    floor = ULPS_WHEN_BASELINE_IS_EXACT * rounding
    assert error <= max(allowed, floor), f"error {error:.3e}, allowed {max(allowed, floor):.3e}"


def int8_weight(packed: torch.Tensor) -> torch.Tensor:
    """f64 [E, N, Kdim]: what unpack_weight rounds to bf16."""
    scales = packed[..., -128:].contiguous().view(torch.float32)
    ones = packed.clone()  # unpacked, the same q at a scale of one
    ones[..., -128:] = torch.ones_like(scales).view(torch.int8)
    return torch.ops.mixtral.unpack_weight(ones).double() * scales.flatten(1)[..., None].double()


def assert_same_product(actual: torch.Tensor, expected: torch.Tensor, float8: bool) -> None:
    """The same bits, but for ``float8`` where tensor cores multiply e4m3.

    These keep fewer bits of a running sum than f32: far from the error of rounding to e4m3, some 2.6 %.
    """
    if float8 and actual.is_cuda and os.environ.get("MIXTRAL_CUDA_KERNELS") == "hopper":
        assert (actual.double() - expected.double()).norm() <= 2**-6 * expected.double().norm()
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
