"""The flags of a run that distill and finetune share. Imports nothing heavy: the parsers need it."""

import argparse
from collections.abc import Callable


def add_train_flags(add: Callable, steps: int, lr: float) -> None:
    """The flags of a run that distill and finetune share, as settings.TrainSettings has them."""
    add("--steps", metavar="N", type=int, default=steps, help=f"length of the run (default: {steps})")
    add("--lr", metavar="X", type=float, default=lr, help=f"peak learning rate (default: {lr:g})")
    add("--warmup", metavar="X", type=float, default=0.05, help="share of the run (default: 0.05)")
    add("--weight-decay", metavar="X", type=float, default=0.1, help="of matrices (default: 0.1)")
    add("--tokens-per-step", metavar="N", type=int, default=8192, help="of all microbatches (default: 8192)")
    add("--accumulation", metavar="N", type=int, default=0, help="microbatches of a step (default: one a process)")
    add("--context", metavar="N", type=int, default=0, help="longest document; the rest is cut (default: the model's)")
    add("--seed", metavar="N", type=int, default=0, help="of new weights and the order of the data (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    add("-t", "--threads", metavar="N", type=int, default=0, help="CPU threads; 0: one per core")
    add("--gradient-checkpointing", action="store_true", help="keep the inputs of layers alone: less memory, more time")
    add("--checkpoint-every", metavar="N", type=int, default=200, help="steps; 0: at the end alone (default: 200)")
    add("--evaluate-every", metavar="N", type=int, default=0, help="steps; 0: at the end alone (default: 0)")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUT")


def train_settings(flags: argparse.Namespace, max_position: int, source: str) -> object:
    """TrainSettings of ``add_train_flags``; the cosine ends at a tenth of the peak.

    Raises:
        SettingsError: a value that no run can have.
    """
    from .settings import TrainSettings, check_train
    from .toml_tables import SettingsError

    if flags.context > max_position:
        raise SettingsError(f"{source}: --context {flags.context} exceeds max_position {max_position} of the model")
    names = "steps lr warmup weight_decay tokens_per_step accumulation seed dtype device threads gradient_checkpointing"
    settings = TrainSettings(
        **{name: getattr(flags, name) for name in names.split()},
        min_lr=flags.lr / 10,
        context=flags.context or min(max_position, flags.tokens_per_step),
    )
    check_train(settings, source)
    return settings
