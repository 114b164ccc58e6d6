"""The student of ``mixtral distill``: how it begins, what it learns (Switch Transformers, 2101.03961, section 4.2)."""

from pathlib import Path

import torch
from torch import Tensor

from ..tokenizer import Tokenizer
from . import prepare
from .batch import Batch, Losses, StepTotals
from .cross_entropy import distill_cross_entropies
from .loop import LossFunction
from .model import Mixtral
from .settings import ModelSettings, TrainSettings
from .toml_tables import SettingsError, parse, read_table


def make_student(teacher: Mixtral, into: Path, init: str, train: TrainSettings, tokenizer: Tokenizer) -> Mixtral:
    """The student before its first step.

    Args:
        into: its folder, or a .toml with [model] and the sizes of a new one.
        init: "teacher": its weights outside of the feed-forward blocks are the teacher's; "student": all are its own.
        tokenizer: the teacher's.

    Raises:
        ValueError: sizes that do not fit the teacher's.
        LoadError, SettingsError: a damaged folder, a wrong configuration.
    """
    options = {"gradient_checkpointing": train.gradient_checkpointing}
    if into.suffix == ".toml":
        sizes = parse(ModelSettings, read_table(into).get("model", {}), into, "model")
        if sizes.from_:
            raise SettingsError(f"{into}: model.from: give that folder to --into")
        sizes.vocab_size = sizes.vocab_size or teacher.config.vocab_size
        config = prepare.new_config(sizes, teacher.config.max_position, tokenizer, into)
        student = Mixtral.from_config(config, train.dtype, train.device, train.seed, **options)
    else:
        student = Mixtral.from_pretrained(into, train.dtype, train.device, **options)
    if student.config.vocab_size != teacher.config.vocab_size:
        sizes = f"{student.config.vocab_size} tokens in the student, {teacher.config.vocab_size} in the teacher"
        raise ValueError(f"{into}: the vocabularies must be the same: {sizes}")
    if init == "teacher":
        copy_outside_feed_forward(teacher, student, str(into))
    student.folder = teacher.folder  # whose tokenizer goes with it
    return student


@torch.no_grad()
def copy_outside_feed_forward(teacher: Mixtral, student: Mixtral, name: str) -> None:
    """Embeddings, attention, norms and head of the teacher into the student (Switch Transformers, table 6).

    Raises:
        ValueError: the student, which is called ``name``, has others, or in other sizes.
    """
    given, taken = _outside_feed_forward(teacher), _outside_feed_forward(student)
    for key, weight in taken.items():
        got = list(given[key].shape) if key in given else "nothing"
        if got != list(weight.shape) or len(given) != len(taken):
            raise ValueError(
                f"{name}: {key} is {list(weight.shape)} in the student and {got} in the teacher: give the student the "
                f"teacher's sizes and {teacher.config.num_layers} layers, or take --init student"
            )
        weight.copy_(given[key])


def _outside_feed_forward(model: Mixtral) -> dict[str, Tensor]:
    return {key: weight for key, weight in model.state_dict().items() if ".mlp." not in key}


def distill_loss(teacher: Mixtral, alpha: float, temperature: float) -> LossFunction:
    """The loss of a microbatch: (1 - alpha) cross-entropy + alpha soft cross-entropy, and the terms of the routers."""

    def loss(model: Mixtral, batch: Batch, totals: StepTotals) -> tuple[Losses, dict[str, Tensor]]:
        with torch.no_grad():
            logits = teacher.logits(batch)
        hard = None

        def mixed(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
            nonlocal hard
            total, hard = distill_cross_entropies((hidden, weight), logits, labels, weights, alpha, temperature)
            return total

        losses = model.loss(batch, totals, mixed)
        return losses._replace(cross_entropy=hard / totals.targets), {"distill": losses.cross_entropy}

    return loss
