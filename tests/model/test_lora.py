"""Adapters merged while loading: the same logits as PEFT's model, or as W + s B A written out."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import mixtral
from adapters import IDS, logits, write_adapter
from checkpoints import TINY, random_model, save_consolidated

EXPERTS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    random_model(num_local_experts=EXPERTS, num_experts_per_tok=2).save_pretrained(folder)
    return folder


def fresh_model(base: Path):
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def randomize(model: torch.nn.Module) -> None:
    """PEFT starts with B = 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def trained(base: Path, folder: Path, **config) -> torch.Tensor:
    """Save an adapter with random values of all kinds, and return the logits of PEFT's model."""
    model = get_peft_model(fresh_model(base), LoraConfig(**{"r": 4, "lora_alpha": 6, **config})).eval()
    randomize(model)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, base: Path) -> None:
    assert (theirs - logits(base)).abs().max() > 0.05, "the adapter changes nothing: the test shows nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=ATTENTION),
        dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
        dict(target_modules=ATTENTION, rank_pattern={"q_proj": 2}, alpha_pattern={r".*\.1\.self_attn\.v_proj": 16}),
        dict(target_modules=["lm_head", "o_proj"]),
        dict(target_modules=["q_proj"], target_parameters=EXPERT_PARAMETERS),
        dict(target_modules=[], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"]),
        dict(target_modules=["embed_tokens", "k_proj"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["attention", "rslora", "patterns", "lm_head", "experts", "down and router", "embeddings", "saved lm_head"],
)
def test_logits_are_those_of_peft(config, base, tmp_path):
    theirs = trained(base, tmp_path, **config)
    assert_close(logits(base, lora=tmp_path), theirs, base)


def test_an_adapter_of_a_dense_model(tmp_path):
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    random_model(dense=True).save_pretrained(tmp_path / "base")
    dense = MistralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["k_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(dense, config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        assert_close(logits(tmp_path / "base", lora=tmp_path / "lora"), model(IDS).logits, tmp_path / "base")


def per_expert(names=("w1", "w2", "w3")) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    tensors = {}
    for layer in range(TINY["num_hidden_layers"]):
        for expert in range(EXPERTS):
            for name in names:
                rows, cols = (hidden, inner) if name == "w2" else (inner, hidden)
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(4, cols, generator=generator) * 0.1
                tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    return tensors


def test_an_adapter_of_single_experts_is_as_in_peft(base, tmp_path):
    write_adapter(tmp_path / "lora", per_expert(), target_modules=["w1", "w2", "w3"])
    model = PeftModel.from_pretrained(fresh_model(base), tmp_path / "lora").eval()
    with torch.no_grad():
        assert_close(logits(base, lora=tmp_path / "lora"), model(IDS).logits, base)


def test_one_matrix_of_an_expert_gets_its_product(base, tmp_path):
    """PEFT on transformers 5 needs w1 and w3 together. The adapter is in bfloat16, the sum in float32."""
    tensors = {name: tensor.bfloat16() for name, tensor in per_expert(["w1"]).items()}
    changed = load_file(base / "model.safetensors")
    for name in [name for name in changed if name.endswith("w1.weight")]:
        a, b = (tensors[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"].float() for x in "AB")
        changed[name] = changed[name] + 6 / 4 * b @ a
    (tmp_path / "merged").mkdir()
    save_file(changed, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "merged" / "config.json").write_bytes((base / "config.json").read_bytes())
    lora = write_adapter(tmp_path / "lora", tensors)
    assert_close(logits(base, lora=lora), logits(tmp_path / "merged"), base)


def expert_parameters(swapped: bool) -> dict[str, torch.Tensor]:
    """Both expert parameters: gate_up_proj inside, as PEFT nests them."""
    generator = torch.Generator().manual_seed(3)
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    tensors = {}
    for layer in range(TINY["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.mlp.experts"
        for path, (out, into) in {f"{module}.base_layer": (2 * inner, hidden), module: (hidden, inner)}.items():
            a = torch.randn(EXPERTS, 4, into, generator=generator) * 0.1
            b = torch.randn(EXPERTS, out, 4, generator=generator) * 0.1
            if swapped:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            tensors[f"{path}.lora_A.weight"] = a.reshape(EXPERTS * 4, -1)
            tensors[f"{path}.lora_B.weight"] = b.permute(1, 2, 0).reshape(-1, 4 * EXPERTS)
    return tensors


def test_both_layouts_of_expert_parameters_are_the_same_adapter(base, tmp_path):
    new = write_adapter(tmp_path / "new", expert_parameters(False), peft_version="0.21.2", target_modules=[],
                        target_parameters=EXPERT_PARAMETERS)  # fmt: skip
    old = write_adapter(tmp_path / "old", expert_parameters(True), peft_version="0.18.1", target_modules=[],
                        target_parameters=EXPERT_PARAMETERS)  # fmt: skip
    model = PeftModel.from_pretrained(fresh_model(base), new).eval()
    with torch.no_grad():
        assert_close(logits(base, lora=new), model(IDS).logits, base)
    assert torch.allclose(logits(base, lora=old), logits(base, lora=new), atol=1e-5)


@pytest.mark.parametrize(("version", "swapped"), [("0.19.1", False), ("0.18.1", True), (None, True)])
def test_the_version_decides_where_in_and_out_are_equal(version, swapped, tmp_path):
    """A square down_proj fits both layouts."""
    torch.manual_seed(0)
    model = random_model(num_local_experts=2, num_experts_per_tok=2, intermediate_size=64)
    model.save_pretrained(tmp_path / "base")
    a, b = torch.randn(2, 4, 64) * 0.1, torch.randn(2, 64, 4) * 0.1  # [E,r,in], [E,out,r]
    module = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{module}.lora_A.weight": a.reshape(8, 64),
        f"{module}.lora_B.weight": b.permute(1, 2, 0).reshape(64, 8),
    }
    lora = write_adapter(tmp_path / "lora", tensors, **({"peft_version": version} if version else {}))
    delta = 6 / 4 * b @ a
    model.model.layers[0].mlp.experts.down_proj.data += delta.transpose(1, 2) if swapped else delta
    with torch.no_grad():
        assert_close(logits(tmp_path / "base", lora=lora), model(IDS).logits, tmp_path / "base")


def interleaved_rows(weight: torch.Tensor) -> torch.Tensor:
    """Rows of q or k in heads of 16, half-split -> rotary pairs side by side."""
    return weight.view(-1, 2, 8, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("scaling", [None, 0.75])
def test_a_lora_of_mistral_finetune(scaling, base, tmp_path):
    """Its q and k rows are interleaved, over either kind of checkpoint."""
    generator = torch.Generator().manual_seed(4)
    model, tensors = fresh_model(base), {}
    hidden, kv = TINY["hidden_size"], 32
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            for name, target, rows in (
                ("wq", layer.self_attn.q_proj, hidden),
                ("wk", layer.self_attn.k_proj, kv),
                ("wo", layer.self_attn.o_proj, hidden),
            ):
                a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((4, hidden), (rows, 4)))
                target.weight += (scaling or 2.0) * b @ a
                tensors[f"layers.{n}.attention.{name}.lora_A.weight"] = a
                tensors[f"layers.{n}.attention.{name}.lora_B.weight"] = b if name == "wo" else interleaved_rows(b)
            inner = TINY["intermediate_size"]
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            for name, target in (("w1", gate_up[2, :inner]), ("w3", gate_up[1, inner:]), ("w2", down[3])):
                expert = {"w1": 2, "w3": 1, "w2": 3}[name]
                a, b = (
                    torch.randn(shape, generator=generator) * 0.1
                    for shape in ((4, target.shape[1]), (target.shape[0], 4))
                )
                target += (scaling or 2.0) * b @ a
                tensors[f"layers.{n}.feed_forward.experts.{expert}.{name}.lora_A.weight"] = a
                tensors[f"layers.{n}.feed_forward.experts.{expert}.{name}.lora_B.weight"] = b
        expected = model(IDS).logits
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "lora.safetensors")
    if scaling:
        params = {"dim": hidden, "lora": {"enable": True, "rank": 4, "dropout": 0.0, "scaling": scaling}}
        (tmp_path / "lora" / "params.json").write_text(json.dumps(params))
    (tmp_path / "consolidated").mkdir()
    save_consolidated(fresh_model(base), tmp_path / "consolidated")
    for folder in (base, tmp_path / "consolidated"):
        assert_close(logits(folder, lora=tmp_path / "lora"), expected, base)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8", "int4"])
def test_the_sum_is_rounded_once_to_the_type_of_the_weights(dtype, tmp_path):
    """As from a checkpoint that PEFT has merged in float32: all but a few bits, where the sums round otherwise."""
    torch.manual_seed(0)
    source, lora, merged = tmp_path / "source", tmp_path / "lora", tmp_path / "merged"
    random_model(num_local_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=64).save_pretrained(source)
    trained(source, lora, target_modules=ATTENTION, target_parameters=EXPERT_PARAMETERS)
    PeftModel.from_pretrained(fresh_model(source), lora).merge_and_unload().save_pretrained(merged)
    ours = mixtral.Mixtral.from_pretrained(source, dtype=dtype, lora=lora).named_parameters()
    theirs = mixtral.Mixtral.from_pretrained(merged, dtype=dtype).named_parameters()
    for name, weight in theirs.items():
        same = (ours[name].view(torch.uint8) == weight.view(torch.uint8)).float().mean()
        assert same > 0.995, name
