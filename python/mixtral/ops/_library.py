"""Loading of ``libmixtral_ops.so`` and what every op wrapper shares."""

from collections.abc import Callable
from pathlib import Path

import torch

from .._torch_version import check_ops

LIBRARY = Path(__file__).resolve().parent.parent / "libmixtral_ops.so"


def load_library() -> None:
    """Load the op library from the package folder. Raises ImportError when it is not built or torch is too old."""
    check_ops()
    if not LIBRARY.exists():
        raise ImportError(f"{LIBRARY} is missing: build it with `cmake --build build` or `pip install .`")
    torch.ops.load_library(LIBRARY)


def register_no_backward(op: str) -> None:
    """Make a backward pass through ``op`` an error in words instead of a silently detached result."""

    def backward(ctx: object, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{op}: has no backward; call it under torch.no_grad() or on tensors without requires_grad")

    torch.library.register_autograd(f"mixtral::{op}", backward)


def register_no_second_backward(op: str) -> None:
    """Make a backward pass through ``op``, itself the backward of another op, an error in words."""

    def backward(ctx: object, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{op}: gradients of gradients are not supported; call autograd without create_graph")

    torch.library.register_autograd(f"mixtral::{op}", backward)


def register_fake(op: str) -> Callable:
    """Decorator: the function gives the shapes, dtypes and strides of the op's outputs without computing them."""
    return torch.library.register_fake(f"mixtral::{op}")
