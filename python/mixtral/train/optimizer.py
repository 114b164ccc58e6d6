"""AdamW or Muon on float32 weights, the schedule, and a gradient norm whose bits do not depend on threads."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .muon import Muon
from .settings import TrainSettings

_ROW = 1024
_NOT_FOR_MUON = ("lm_head.weight", "mlp.gate.weight")


def learning_rate(done: float, settings: TrainSettings) -> float:
    """Linear warm-up over the first ``warmup`` of the run, then a cosine from ``lr`` to ``min_lr``.

    Args:
        done: the share of the run that has passed at the end of the step, in (0, 1].
    """
    if done < settings.warmup:
        return settings.lr * done / settings.warmup
    angle = math.pi * (min(done, 1.0) - settings.warmup) / (1 - settings.warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(angle))


def sum_of_squares(x: Tensor) -> Tensor:
    """Σ x² in float64, scalar.

    Torch splits a sum over everything among its threads, so its last bits depend on their number. Here rows of 1,024
    are added, each by one thread, then the sums of the rows in the same way.
    """
    x = x.detach().reshape(-1).double().square()
    while x.numel() > _ROW:
        x = F.pad(x, (0, -x.numel() % _ROW)).view(-1, _ROW).sum(1)
    return x.sum()


class Optimizer:
    """AdamW (Loshchilov and Hutter, 1711.05101) or Muon with clipping, for the parameters that require a gradient.

    A parameter that is not float32 has a float32 master, in which gradients are accumulated and which is updated; the
    parameter is its rounded copy. Matrices decay; norms, biases and the embedding table do not: most rows of the
    table have no gradient in a step, so decay would be all that they learn. With ``optimizer = "muon"`` the matrices of
    attention and experts have Muon, and all else, routers among it, AdamW.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.clip = settings.clip
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.parameters.items()
        }
        matrices = [n for n, p in self.parameters.items() if p.dim() > 1 and "embed_tokens" not in n]
        by_muon = [n for n in matrices if settings.optimizer == "muon" and not n.endswith(_NOT_FOR_MUON)]
        decay = settings.weight_decay
        self.moments = {name: ("exp_avg",) if name in by_muon else ("exp_avg", "exp_avg_sq") for name in self.masters}
        self.optimizers: list[torch.optim.Optimizer] = []
        if by_muon:
            self.optimizers.append(Muon([self.masters[n] for n in by_muon], settings.lr, decay))
        decayed = [p for n, p in self.masters.items() if n in matrices and n not in by_muon]
        rest = [p for n, p in self.masters.items() if n not in matrices]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        if groups := [group for group in groups if group["params"]]:
            betas = tuple(settings.betas)
            adamw = torch.optim.AdamW(groups, settings.lr, betas, settings.eps, foreach=False, fused=False)
            self.optimizers.append(adamw)
        self.states = {p: o.state for o in self.optimizers for group in o.param_groups for p in group["params"]}

    def accumulate(self) -> None:
        """Moves the gradients of a microbatch into the masters."""
        for name, master in self.masters.items():
            p = self.parameters[name]
            if master is p or p.grad is None:
                continue
            grad = p.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients, zeros where a parameter had no part in the loss; the same list on every rank."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values()]

    def norm(self) -> float:
        """The norm of all gradients together."""
        return math.sqrt(float(torch.stack([sum_of_squares(grad) for grad in self.gradients()]).sum()))

    def step(self, lr: float, norm: float) -> None:
        """Clips the gradients to the norm ``clip``, updates the weights, and forgets the gradients."""
        if norm > self.clip:
            for grad in self.gradients():
                grad.mul_(self.clip / norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.copy_masters()

    def copy_masters(self) -> None:
        """Rounds the masters into the parameters."""
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name: ``weight.NAME``, ``exp_avg.NAME``, of AdamW also ``exp_avg_sq.NAME``."""
        tensors = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            found = self.states[master][master]
            for moment in self.moments[name]:
                tensors[f"{moment}.{name}"] = found.get(moment, torch.zeros_like(master)).detach()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], step: int) -> None:
        """Takes what ``state`` gave after ``step`` steps.

        Raises:
            ValueError: tensors of other parameters or shapes.
        """
        wanted = {f"{kind}.{name}" for name in self.masters for kind in ("weight", *self.moments[name])}
        given = {name for name in tensors if not name.startswith("buffer.")}
        if wanted != given:
            raise ValueError(f"{sorted(wanted ^ given)[0]} is in only one of the checkpoint and the model")
        with torch.no_grad():
            for name, master in self.masters.items():
                tensor = tensors[f"weight.{name}"]
                if tensor.shape != master.shape:
                    raise ValueError(
                        f"{name}: {list(tensor.shape)} in the checkpoint, {list(master.shape)} in the model"
                    )
                master.copy_(tensor)
                if step > 0:
                    moments = {m: tensors[f"{m}.{name}"].to(master.device) for m in self.moments[name]}
                    self.states[master][master] = {"step": torch.tensor(float(step)), **moments}
        self.copy_masters()
