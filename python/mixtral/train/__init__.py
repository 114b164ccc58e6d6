"""Training on ``mixtral.ops``: losses of the router and of the vocabulary."""

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

__all__ = [
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
