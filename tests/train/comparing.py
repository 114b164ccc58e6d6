"""What the tests of losses share."""

import torch
from torch import Tensor


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, retain_graph=True))


def assert_close(actual: object, expected: object, rtol: float = 1e-6) -> None:
    """To ``rtol`` of the largest number."""
    if isinstance(actual, list | tuple):
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, rtol)
    else:
        scale = expected.abs().max().item() if expected.numel() > 0 else 0.0
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=rtol * max(scale, 1e-30))
