"""Adapters that cannot be merged are LoadErrors that name the tensor or field."""

import pytest
import torch

import mixtral
from adapters import logits, write_adapter

pytest_plugins = ["checkpoint_fixtures"]

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def q_adapter(rank: int = 4, rows: int = 64, cols: int = 64) -> dict[str, torch.Tensor]:
    return {f"{Q}.lora_A.weight": torch.ones(rank, cols), f"{Q}.lora_B.weight": torch.ones(rows, rank)}


def without(tensors: dict[str, torch.Tensor], half: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if half not in name}


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (q_adapter(cols=32), {}, r"shape must be \[4, 64\], got \[4, 32\]"),
        (q_adapter(rows=32), {}, r"shape must be \[64, 4\], got \[32, 4\]"),
        (q_adapter(rank=2), {}, "rank must be 4 as in adapter_config.json, got 2"),
        (without(q_adapter(), "lora_B"), {}, "its lora_B is missing"),
        (without(q_adapter(), "lora_A"), {}, "its lora_A is missing"),
        ({k.replace("q_proj", "qkv_proj"): t for k, t in q_adapter().items()}, {},
         r"belongs to no part of this model; the nearest is model.layers.0.self_attn.[qkv]_proj.weight"),
        ({k: t.to(torch.int32) for k, t in q_adapter().items()}, {}, "dtype must be F32, BF16 or F16, got I32"),
        ({k: t / 0 for k, t in q_adapter().items()}, {}, "must be finite"),
        ({**q_adapter(), f"{Q}.lora_magnitude_vector.weight": torch.ones(64)}, {}, "belongs to no part of this model"),
        (q_adapter(), {"use_dora": True}, "use_dora: is not supported, got true"),
        (q_adapter(), {"bias": "all"}, "bias: must be \"none\""),
        (q_adapter(), {"fan_in_fan_out": True}, "fan_in_fan_out: is not supported"),
        (q_adapter(), {"peft_type": "IA3"}, 'peft_type: must be "LORA", got "IA3"'),
        (q_adapter(), {"init_lora_weights": "pissa"}, "init_lora_weights: changes the base weights too"),
        (q_adapter(), {"alpha_pattern": {"(q|k)_proj": 2}}, "alpha_pattern: the pattern .* is not supported"),
        (q_adapter(), {"r": "4"}, "r: must be a number"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_merged_are_load_errors(tensors, config, reason, source, tmp_path):
    lora = write_adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(mixtral.LoadError, match=reason):
        logits(source, lora=lora)


def test_expert_shapes_that_fit_nothing_are_a_load_error(source, tmp_path):
    module = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{module}.lora_A.weight": torch.ones(16, 65), f"{module}.lora_B.weight": torch.ones(64, 16)}
    with pytest.raises(
        mixtral.LoadError, match=r"\[16, 65\] and \[64, 16\] of A and B fit no parameter of the experts"
    ):
        logits(source, lora=write_adapter(tmp_path / "lora", tensors))


def test_an_adapter_that_adds_tokens_is_a_load_error(source, tmp_path):
    tensors = {**q_adapter(), "base_model.model.lm_head.weight": torch.ones(98, 64)}
    with pytest.raises(mixtral.LoadError, match="has 98 rows for a vocabulary of 96: adapters that add tokens are not"):
        logits(source, lora=write_adapter(tmp_path / "lora", tensors))


def test_folders_that_are_no_adapters(source, tmp_path):
    with pytest.raises(mixtral.LoadError, match="is no adapter: holds neither adapter_config.json"):
        logits(source, lora=source)
    with pytest.raises(mixtral.LoadError, match="nowhere: does not exist"):
        logits(source, lora=tmp_path / "nowhere")


def test_an_adapter_is_no_model(source, tmp_path):
    lora = write_adapter(tmp_path / "lora", q_adapter(), base_model_name_or_path="org/base")
    with pytest.raises(
        mixtral.LoadError, match=r'is an adapter, not a model: .* \("org/base"\), and this folder to --lora'
    ):
        logits(lora)
    (lora / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(
        mixtral.LoadError, match=r"holds an adapter, adapter_model.safetensors, and no model: .* --lora"
    ):
        logits(lora)


def test_an_adapter_may_be_named_as_in_the_cache(source, tmp_path, monkeypatch):
    cached = tmp_path / "models--org--lora" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    lora = write_adapter(cached, q_adapter())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(logits(source, lora="org/lora"), logits(source, lora=lora))
