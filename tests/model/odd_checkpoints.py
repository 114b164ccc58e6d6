"""Spoils checkpoints, and loads what is left."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixtral
from checkpoints import random_model, save_consolidated

IDS = torch.tensor([[1, 17, 4, 93, 8]])
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / name, metadata={"format": "pt"})


def edit(folder: Path, drop: tuple[str, ...] = (), name: str = "config.json", **fields: object) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**{k: v for k, v in config.items() if k not in drop}, **fields}))


def load(folder: Path, **options) -> tuple[mixtral.Mixtral, list[str]]:
    """A model and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = mixtral.Mixtral.from_pretrained(folder, **options)
    assert all(Path(w.filename) == Path(__file__) for w in caught), "the warning does not point to the caller"
    return model, [str(w.message) for w in caught]


def assert_same_model(folder: Path, source: Path) -> list[str]:
    model, said = load(folder)
    assert torch.equal(model(IDS), load(source)[0](IDS))
    return said


def assert_load_error(folder: Path, reason: str, **options) -> None:
    with pytest.raises(mixtral.LoadError, match=reason):
        mixtral.Mixtral.from_pretrained(folder, **options)


def shards(folder: Path, tensors: dict[str, torch.Tensor], keep_single: bool = False) -> dict[str, str]:
    """Write two shards and an index; the index's map."""
    names = sorted(tensors)
    places = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        write(folder, {name: tensors[name] for name in names if places[name] == shard}, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    if not keep_single:
        (folder / "model.safetensors").unlink(missing_ok=True)
    return places


def consolidated(folder: Path) -> dict:
    torch.manual_seed(0)
    save_consolidated(random_model(num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16), folder)
    return json.loads((folder / "params.json").read_text())
