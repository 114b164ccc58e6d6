"""AdamW on float32 weights, its schedule, and a gradient norm whose bits do not depend on threads."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import TrainSettings

_ROW = 1024


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
    """AdamW (Loshchilov and Hutter, 1711.05101) with clipping, for the parameters that require a gradient.

    A parameter that is not float32 has a float32 master, in which gradients are accumulated and which is updated; the
    parameter is its rounded copy. Matrices decay; norms, biases and the embedding table do not: most rows of the
    table have no gradient in a step, so decay would be all that they learn.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.clip = settings.clip
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.parameters.items()
        }
        decayed = {name for name, p in self.parameters.items() if p.dim() > 1 and "embed_tokens" not in name}
        groups = [
            {"params": [p for n, p in self.masters.items() if n in decayed], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in self.masters.items() if n not in decayed], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=tuple(settings.betas),
            eps=settings.eps,
            foreach=False,
            fused=False,
        )

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
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.copy_masters()

    def copy_masters(self) -> None:
        """Rounds the masters into the parameters."""
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name: ``weight.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``."""
        tensors = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.adamw.state[master].get(moment, torch.zeros_like(master)).detach()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], step: int) -> None:
        """Takes what ``state`` gave after ``step`` steps.

        Raises:
            ValueError: tensors of other parameters or shapes.
        """
        wanted = {f"{kind}.{name}" for name in self.masters for kind in ("weight", "exp_avg", "exp_avg_sq")}
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
                    self.adamw.state[master] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
                    }
        self.copy_masters()
