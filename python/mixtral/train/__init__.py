"""Training on ``mixtral.ops``: the model as a module, its batches, and the losses of routers and vocabulary."""

from .batch import Batch, Losses, StepTotals
from .losses import (
    CONVENTIONS,
    RouterSums,
    distill_cross_entropy,
    linear_cross_entropy,
    load_balance_loss,
    load_balance_loss_from_sums,
    router_sums,
    z_loss,
    z_loss_from_sums,
)
from .model import Mixtral
from .options import RouterOptions

__all__ = [
    "Batch",
    "Losses",
    "Mixtral",
    "RouterOptions",
    "StepTotals",
    "CONVENTIONS",
    "RouterSums",
    "distill_cross_entropy",
    "linear_cross_entropy",
    "load_balance_loss",
    "load_balance_loss_from_sums",
    "router_sums",
    "z_loss",
    "z_loss_from_sums",
]
