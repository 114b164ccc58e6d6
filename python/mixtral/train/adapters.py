"""LoRA adapters (Hu et al., 2021) on ``train.Mixtral``, by PEFT and in its files.

``mixtral ... --lora FOLDER`` reads them (csrc/checkpoint/lora.h), and so does PEFT over the same model in transformers,
because the names of the module are those of transformers 5.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import Config
from .model import Mixtral

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # parameters [E, out, in], with a pair A, B each
TARGETS = ("attention", "experts")


def add_lora(
    model: Mixtral, rank: int, alpha: float, targets: Sequence[str], train_router: bool = False, seed: int = 0
) -> object:
    """Freezes ``model`` and puts adapters W + alpha / rank B A into it; B starts at zero, so nothing changes yet.

    Args:
        model: changed in place: it stays the model to train.
        rank: of every A and B; each expert has its own.
        targets: "attention": the four projections; "experts": both matrices of every expert, or the three of a dense
            feed-forward block.
        train_router: train the routers too, whole.
        seed: of A.

    Returns:
        PEFT's wrapper around ``model``, for ``save_adapter``.

    Raises:
        ValueError: a rank or target that there is not.
    """
    from peft import LoraConfig, get_peft_model

    check_lora(model.config, rank, targets, train_router)
    modules = list(ATTENTION) if "attention" in targets else []
    experts = "experts" in targets
    if experts and not model.config.is_moe:
        modules += DENSE
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=list(EXPERTS) if experts and model.config.is_moe else None,
        modules_to_save=["gate"] if train_router else None,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        wrapper = get_peft_model(model, config)
    finally:
        torch.random.set_rng_state(state)
    wrapper.peft_config["default"].task_type = "CAUSAL_LM"
    wrapper.peft_config["default"].base_model_name_or_path = str(model.folder) if model.folder else None
    return wrapper


def check_lora(config: Config, rank: int, targets: Sequence[str], train_router: bool) -> None:
    """Raises ValueError for a rank or target that there is not."""
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    wrong = [target for target in targets if target not in TARGETS]
    if wrong or not targets:
        raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {', '.join(wrong) or 'none'}")
    if train_router and not config.is_moe:
        raise ValueError("a dense model has no router to train")


def save_adapter(wrapper: object, out: Path) -> None:
    """Writes adapter_model.safetensors and, last, adapter_config.json into the folder ``out``; each appears whole.

    Raises:
        OSError: they cannot be written; an earlier adapter is then as it was, or whole.
    """
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=out) as aside:
        wrapper.save_pretrained(aside, save_embedding_layers=False)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(aside) / name, out / name)
