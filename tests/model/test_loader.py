"""Checkpoints as transformers and Mistral write them, through the Python interface: same model, same bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixtral
from checkpoints import TINY, random_model, save_consolidated


def parameters(folder: Path, dtype: str = "auto") -> dict[str, torch.Tensor]:
    return mixtral.Mixtral.from_pretrained(folder, dtype=dtype).named_parameters()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def hf_model():
    torch.manual_seed(0)
    return random_model(num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16)


@pytest.fixture(scope="module")
def v4_folder(hf_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("v4")
    hf_model.save_pretrained(folder)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def consolidated_folder(hf_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("consolidated")
    save_consolidated(hf_model, folder)
    return folder


def test_parameters_are_those_of_transformers(hf_model, v4_folder):
    ours, theirs = parameters(v4_folder), hf_model.state_dict()
    assert torch.equal(ours["embed_tokens"], theirs["model.embed_tokens.weight"])
    for n in range(TINY["num_hidden_layers"]):
        moe, mlp = f"layers.{n}.moe", f"model.layers.{n}.mlp"
        assert torch.equal(ours[f"{moe}.gate_up_proj"], theirs[f"{mlp}.experts.gate_up_proj"])
        assert torch.equal(ours[f"{moe}.down_proj"], theirs[f"{mlp}.experts.down_proj"])
        assert torch.equal(ours[f"{moe}.router"], theirs[f"{mlp}.gate.weight"].float())


def test_merged_names_load_alike(hf_model, v4_folder, tmp_path):
    hf_model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    assert_same(parameters(tmp_path), parameters(v4_folder))


def test_shards_load_alike(hf_model, v4_folder, tmp_path):
    hf_model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(parameters(tmp_path), parameters(v4_folder))


def test_consolidated_loads_alike(v4_folder, consolidated_folder):
    assert_same(parameters(consolidated_folder), parameters(v4_folder))


def test_dtype_is_converted_while_reading(v4_folder):
    converted = parameters(v4_folder, dtype="float32")
    for name, tensor in parameters(v4_folder).items():
        assert torch.equal(converted[name], tensor.float()), name


def test_config_of_both_layouts_agrees(v4_folder, consolidated_folder):
    ours, theirs = mixtral.Config.from_folder(v4_folder), mixtral.Config.from_folder(consolidated_folder)
    for field in ("hidden_size", "num_layers", "head_dim", "num_experts", "top_k", "rope_theta", "window", "dtype"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.total_parameters == theirs.total_parameters


def test_bad_files_raise_load_error_with_the_tensor_named(v4_folder, tmp_path):
    for file in v4_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 47}))
    with pytest.raises(mixtral.LoadError, match=r"w1\.weight: shape must be \[47, 64\], got \[48, 64\]") as error:
        parameters(tmp_path)
    assert error.value.item == "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def test_what_safetensors_writes_is_what_is_read(v4_folder):
    stored = load_file(v4_folder / "model.safetensors")
    ours = parameters(v4_folder)
    q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(ours["layers.1.attention.qkv_proj"], torch.cat([q, k, v]))
