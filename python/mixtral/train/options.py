"""How the routers of a model are trained."""

from dataclasses import dataclass

BALANCES = ("switch", "global", "loss_free", "none")


@dataclass(frozen=True)
class RouterOptions:
    """Options of every router of a model.

    Attributes:
        balance: how the load of the experts is kept even. "switch": a loss over each microbatch (Fedus et al.,
            "Switch Transformers", 2021, eq. 4); "global": the same with the load of the whole optimizer step (Qiu et
            al., "Demons in the Detail", 2025); "loss_free": no loss, a bias that selection alone sees (Wang et al.,
            "Auxiliary-Loss-Free Load Balancing", 2024); "none".
        balance_coefficient: factor of the balance loss of "switch" and "global", which is 1 for an even load: f sums
            to 1, and layers are averaged (``losses.CONVENTIONS["mixtral"]``).
        z_coefficient: factor of the z-loss (Zoph et al., "ST-MoE", 2022, eq. 5).
        jitter: the router's input is multiplied by numbers drawn from [1 - jitter, 1 + jitter] in training.
        expert_dropout: share of an expert's activations dropped in training (Switch Transformers, section 2.4).
        init_scale: s; router weights start with standard deviation sqrt(s / hidden size). None: 0.02, as all others.
        bias_update_rate: u of "loss_free".

    Raises:
        ValueError: a value is outside its range.
    """

    balance: str = "switch"
    balance_coefficient: float = 1e-2
    z_coefficient: float = 1e-3
    jitter: float = 0.0
    expert_dropout: float = 0.0
    init_scale: float | None = None
    bias_update_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {self.balance!r}")
        for name in ("balance_coefficient", "z_coefficient", "bias_update_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("jitter", "expert_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.init_scale is not None and not 0 < self.init_scale < float("inf"):
            raise ValueError(f"init_scale must be more than 0, got {self.init_scale}")
