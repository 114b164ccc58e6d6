"""Training on ``mixtral.ops``: the model as a module, its batches, and the losses of routers and vocabulary."""

from typing import TYPE_CHECKING

from .batch import Batch, Losses, StepTotals
from .cross_entropy import distill_cross_entropies, distill_cross_entropy, linear_cross_entropy
from .losses import (
    CONVENTIONS,
    RouterSums,
    load_balance_loss,
    load_balance_loss_from_sums,
    router_sums,
    z_loss,
    z_loss_from_sums,
)
from .options import RouterOptions

if TYPE_CHECKING:
    from .model import Mixtral as Mixtral

__all__ = [
    "Batch",
    "Losses",
    "Mixtral",
    "RouterOptions",
    "StepTotals",
    "CONVENTIONS",
    "RouterSums",
    "distill_cross_entropies",
    "distill_cross_entropy",
    "linear_cross_entropy",
    "load_balance_loss",
    "load_balance_loss_from_sums",
    "router_sums",
    "z_loss",
    "z_loss_from_sums",
]


def __getattr__(name: str) -> object:
    """The model needs the model library; losses and batches do not."""
    if name == "Mixtral":
        from .model import Mixtral

        return Mixtral
    raise AttributeError(f"module 'mixtral.train' has no attribute {name!r}")
