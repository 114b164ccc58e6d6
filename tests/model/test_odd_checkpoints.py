"""Checkpoints as people have them: files that disagree, and names with prefixes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixtral
from checkpoints import random_model, save_consolidated
from odd_checkpoints import (
    IDS,
    INDEX,
    SHARDS,
    assert_load_error,
    assert_same_model,
    consolidated,
    edit,
    load,
    shards,
    tensors_of,
    write,
)

pytest_plugins = ["checkpoint_fixtures"]

# ---- the configuration against the contents --------------------------------------------------------------------------


def test_a_good_checkpoint_gives_no_warning(source):
    assert load(source)[1] == []


def test_an_lm_head_of_its_own_is_used_where_the_configuration_ties_it(folder, source):
    edit(folder, tie_word_embeddings=True)
    said = assert_same_model(folder, source)
    assert len(said) == 1 and "tie_word_embeddings" in said[0] and "another lm_head" in said[0]
    assert load(folder)[0].config.tie_word_embeddings is False


def test_an_lm_head_that_repeats_the_embeddings_stays_tied(folder):
    tensors = tensors_of(folder)
    write(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    edit(folder, tie_word_embeddings=True)
    model, said = load(folder)
    assert said == [] and model.config.tie_word_embeddings and "lm_head" not in model.named_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_dtype_in_the_configuration_the_files_decide(dtype, folder):
    write(folder, {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()})
    edit(folder, drop=("dtype", "torch_dtype"))
    model, said = load(folder)
    assert model.weight_type == str(dtype).removeprefix("torch.") and said == []


def test_a_dtype_in_the_configuration_is_taken(folder):
    edit(folder, drop=("torch_dtype",), dtype="float32")
    assert load(folder)[0].weight_type == "float32"


@pytest.mark.parametrize("rows", [98, 80])
def test_the_embeddings_decide_the_size_of_the_vocabulary(rows, folder):
    tensors = tensors_of(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])[:rows]
    write(folder, tensors)
    edit(folder, eos_token_id=[2, 97])
    model, said = load(folder)
    assert model.config.vocab_size == rows and model(IDS % rows).shape[-1] == rows
    assert f"vocab_size is 96, but the files hold {rows} embeddings, which are used" in said[0]
    assert model.config.eos_token_ids == ([2, 97] if rows > 97 else [2])


def test_a_head_of_another_size_than_the_embeddings_is_a_load_error(folder):
    tensors = tensors_of(folder)
    write(folder, {**tensors, "lm_head.weight": tensors["lm_head.weight"][:80]})
    assert_load_error(folder, r"lm_head\.weight: shape must be \[96, 64\], got \[80, 64\]")


def test_consolidated_weights_beside_config_json_alone(folder, source):
    (folder / "model.safetensors").unlink()
    consolidated(folder)
    (folder / "params.json").unlink()
    assert assert_same_model(folder, source) == []


def test_which_of_two_sets_of_weights_is_read_is_said(folder, source):
    model = random_model(num_local_experts=4, num_experts_per_tok=2)
    save_consolidated(model, folder)
    said = assert_same_model(folder, source)
    assert len(said) == 1 and "consolidated*.safetensors; model*.safetensors is read" in said[0]


def test_a_single_file_goes_before_shards_as_in_transformers(folder, source):
    from transformers import AutoModelForCausalLM

    shards(folder, {name: torch.zeros_like(t) for name, t in tensors_of(folder).items()}, keep_single=True)
    said = assert_same_model(folder, source)
    assert len(said) == 1 and "model.safetensors alone is read" in said[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(theirs.lm_head.weight, tensors_of(source)["lm_head.weight"])


def test_an_end_of_sequence_outside_the_vocabulary_is_left_out(folder):
    edit(folder, eos_token_id=[2, 96])
    model, said = load(folder)
    assert model.config.eos_token_ids == [2]
    assert len(said) == 1 and "eos_token_id: 96 is not in the vocabulary of 96" in said[0]


def test_the_configuration_alone_warns_too(folder):
    edit(folder, eos_token_id=-5)
    with pytest.warns(UserWarning, match="eos_token_id: -5"):
        assert mixtral.Config.from_folder(folder).eos_token_ids == [2]  # of generation_config.json


# ---- shards and their index ------------------------------------------------------------------------------------------


def test_an_index_that_lists_too_much_is_a_warning(folder, source):
    places = shards(folder, tensors_of(folder))
    edit(folder, name=INDEX, weight_map={**places, "model.layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]})
    said = assert_same_model(folder, source)
    assert len(said) == 1 and "lists tensors that no file holds: model.layers.0.self_attn.rotary_emb.inv" in said[0]


def test_an_index_that_lists_too_little_or_another_file_is_a_warning(folder, source):
    places = shards(folder, tensors_of(folder))
    del places["lm_head.weight"]
    places["model.norm.weight"] = next(shard for shard in SHARDS if shard != places["model.norm.weight"])
    edit(folder, name=INDEX, weight_map=places)
    said = assert_same_model(folder, source)
    assert len(said) == 1 and "does not say where these tensors are: lm_head.weight and 1 more" in said[0]


def test_a_tensor_that_is_needed_must_be_there_once(folder):
    tensors = tensors_of(folder)
    places = shards(folder, tensors)
    other = next(shard for shard in SHARDS if shard != places["lm_head.weight"])
    write(folder, {**load_file(folder / other), "lm_head.weight": tensors["lm_head.weight"]}, other)
    with pytest.warns(UserWarning, match="does not say where these tensors are: lm_head.weight"):
        assert_load_error(folder, r"lm_head\.weight: is in .*model-0000. *.* too")


def test_shards_without_an_index_load(folder, source):
    shards(folder, tensors_of(folder))
    (folder / INDEX).unlink()
    assert assert_same_model(folder, source) == []
    (folder / SHARDS[1]).unlink()
    assert_load_error(folder, r"holds 1 of 2 files .*-of-00002\.safetensors, and no index")


def test_a_missing_shard_is_named(folder):
    shards(folder, tensors_of(folder))
    (folder / SHARDS[1]).unlink()
    assert_load_error(folder, rf"{SHARDS[1]}: is listed, but there is no such file: download it again")


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: "base_model.model." + name,
        lambda name: "_fsdp_wrapped_module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "model." + name,
        lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
    ids=["module", "_orig_mod", "peft", "fsdp", "two", "model", "base_layer", "inside"],
)
def test_prefixes_of_training_are_taken_off(rename, folder, source):
    tensors = {rename(name): tensor for name, tensor in tensors_of(folder).items()}
    write(folder, tensors)
    assert assert_same_model(folder, source) == []
    shards(folder, tensors)
    assert assert_same_model(folder, source) == []


def test_a_prefix_that_only_some_names_have_is_part_of_them(folder):
    tensors = tensors_of(folder)
    write(folder, {("module." if "norm" in name else "") + name: tensor for name, tensor in tensors.items()})
    assert_load_error(folder, 'tensor is missing; the nearest name in the files is "module.model.norm.weight"')


def test_two_names_that_become_one_are_a_load_error(folder):
    tensors = tensors_of(folder)
    write(folder, {**tensors, "_orig_mod.lm_head.weight": tensors["lm_head.weight"].clone()})
    assert_load_error(folder, "occurs twice")


def test_a_missing_tensor_shows_the_nearest_name(folder):
    tensors = tensors_of(folder)
    tensors["model.embed_token.weight"] = tensors.pop("model.embed_tokens.weight")
    write(folder, tensors)
    assert_load_error(folder, r'model\.embed_tokens\.weight: tensor is missing; .* "model\.embed_token\.weight"')


def test_empty_tensors_of_zero3_are_named(folder):
    write(folder, {name: tensor.new_empty(0) for name, tensor in tensors_of(folder).items()})
    assert_load_error(folder, r"got \[0\]: DeepSpeed ZeRO-3 saved it without gathering")


def test_an_adapter_left_inside_is_named(folder):
    extra = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(8, 64)}
    write(folder, {**tensors_of(folder), **extra})
    assert_load_error(folder, "is of an adapter that was not merged")


# ---- mistral-finetune -----------------------------------------------------------------------------------------------


def test_merged_weights_with_a_lora_block_load(source, tmp_path):
    params = consolidated(tmp_path)
    params["lora"] = {"enable": True, "rank": 64, "dropout": 0.0, "scaling": 2.0}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert assert_same_model(tmp_path, source) == []


def test_a_lora_alone_is_named(tmp_path):
    consolidated(tmp_path)
    (tmp_path / "consolidated.safetensors").unlink()
    save_file({"layers.0.attention.wq.lora_A.weight": torch.zeros(4, 64)}, tmp_path / "lora.safetensors")
    assert_load_error(tmp_path, r"holds an adapter, lora\.safetensors, and no model: .* this folder to --lora")
