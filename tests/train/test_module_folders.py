"""Saving and loading the model for training: lossless, whole or not at all, read by everyone else."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_models import DENSE, in_transformers, livelier, random_batch, random_config, small_config
from transformers import AutoConfig, AutoModelForCausalLM

import mixtral
from mixtral.train import Mixtral, folders

FORMATS = ["huggingface", "huggingface_v4", "consolidated"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(8))
def test_round_trip_is_lossless(seed: int, format: str, tmp_path: Path) -> None:
    config = random_config(100 + seed)
    model = livelier(Mixtral.from_config(config)).to_dtype([torch.bfloat16, torch.float32][seed % 2])
    model.save_pretrained(tmp_path / "model", format)
    again = Mixtral.from_pretrained(tmp_path / "model")
    assert again.training and all(weight.requires_grad for weight in again.parameters())
    assert list(again.state_dict()) == list(model.state_dict())
    for name, weight in model.state_dict().items():
        other = again.state_dict()[name]
        assert torch.equal(weight, other) and weight.dtype == other.dtype, name
    assert again.config.to_dict() == model.config.to_dict()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == config.tie_word_embeddings
    # A gradient step on the loaded model changes no tensor but its own.
    storages = {weight.untyped_storage().data_ptr() for weight in again.parameters()}
    assert len(storages) == len(list(again.parameters()))


@pytest.mark.parametrize("fields", [{}, DENSE | {"window": 4}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("format", FORMATS[:2])
def test_transformers_reads_the_folder(fields: dict, format: str, tmp_path: Path) -> None:
    model = livelier(Mixtral.from_config(small_config(**fields))).eval()
    model.save_pretrained(tmp_path / "model", format)
    twin, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    input_ids = random_batch(model.config).input_ids[None]
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids).logits, model(input_ids), rtol=1e-4, atol=1e-4)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.rope_parameters["rope_theta"] == 1e4 and config.sliding_window == (fields.get("window") or None)


def test_from_pretrained_reads_what_transformers_writes(tmp_path: Path) -> None:
    model = livelier(Mixtral.from_config(small_config()))
    twin = in_transformers(model, tmp_path / "ours")
    twin.config.sliding_window = None
    twin.save_pretrained(tmp_path / "theirs")
    again = Mixtral.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert again.model.layers[0].mlp.gate.weight.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(
            again.state_dict()[name].float(), weight if "gate.weight" in name else weight.bfloat16().float()
        )


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_SHARD_BYTES", 30_000)
    model = livelier(Mixtral.from_config(small_config()))
    model.save_pretrained(tmp_path / "model", "huggingface_v4")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    held = {name: f.name for f in files for name in load_file(f)}
    assert held == index["weight_map"]
    again = Mixtral.from_pretrained(tmp_path / "model")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_small_files_come_along(tmp_path: Path) -> None:
    model = Mixtral.from_config(small_config())
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").write_text("{}")
    (tmp_path / "first" / "LICENSE").write_text("Apache-2.0")
    Mixtral.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second" / "deep", "consolidated")
    assert sorted(os.listdir(tmp_path / "second" / "deep")) == [
        "LICENSE",
        "consolidated.safetensors",
        "params.json",
        "tokenizer.json",
    ]
    assert os.listdir(tmp_path / "second") == ["deep"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixtral.from_config(small_config())
    with pytest.raises(ValueError, match="format must be one of huggingface, huggingface_v4, consolidated, got 'gguf'"):
        model.save_pretrained(tmp_path / "model", "gguf")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("safetensors.torch.save_file", full)
        model.save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path) == []
    (tmp_path / "model").mkdir()
    model.save_pretrained(tmp_path / "model")
    before = sorted(os.listdir(tmp_path / "model"))
    with pytest.raises(ValueError, match="must not exist or be an empty folder"):
        model.save_pretrained(tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == before == ["config.json", "model.safetensors"]


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(mixtral.LoadError):
        Mixtral.from_pretrained(tmp_path / "nothing")
    Mixtral.from_config(small_config()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got int8"):
        Mixtral.from_pretrained(tmp_path / "model", dtype="int8")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"format": "mixtral", "dtype": "int8"}
    config |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 64}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(mixtral.LoadError, match="int8 cannot be trained") as caught:
        Mixtral.from_pretrained(tmp_path / "model")
    assert caught.value.item == "quantization_config"
