"""Writes adapters as PEFT does, and loads them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import mixtral

IDS = torch.tensor([[1, 17, 4, 93, 8, 60, 22]])


def logits(folder: Path, **options) -> torch.Tensor:
    return mixtral.Mixtral.from_pretrained(folder, dtype="float32", **options)(IDS)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["w1"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
