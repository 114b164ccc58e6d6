"""Checkpoints as people have them: files that disagree, names with prefixes, downloads that went wrong."""

import json
import os
import shutil
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


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    random_model(num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


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
        assert mixtral.Config.from_folder(folder).eos_token_ids == []


# ---- shards and their index ------------------------------------------------------------------------------------------


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


# ---- other quantisations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_other_quantisations_are_refused_by_name(method, folder):
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    assert_load_error(folder, f'"{method}" is not supported: take the checkpoint that is not quantised')


def test_packed_weights_of_others_are_recognised_without_a_configuration(folder):
    tensors = tensors_of(folder)
    name = "model.layers.0.self_attn.q_proj"
    del tensors[f"{name}.weight"]
    write(folder, {**tensors, f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32)})
    assert_load_error(folder, "quantised by AWQ or GPTQ, which is not supported")


def test_weights_of_bitsandbytes_are_recognised_without_a_configuration(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = {name: torch.zeros(2048, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(64)}
    write(folder, {**tensors_of(folder), **packed})
    assert_load_error(folder, "is quantised by bitsandbytes, which is not supported")


# ---- downloads that went wrong --------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9000000000\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POINTER, "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
        (b"<html><body>401 Unauthorized</body></html>", "is a web page, not the file itself"),
        (b"", "is empty: download it again"),
        (b"GGUF\x03\0\0\0" + bytes(64), "is a GGUF file"),
        (b"PK\x03\x04" + bytes(64), "is a zip archive"),
        (b"\x80\x02}q\x00X" + bytes(64), "is a Python pickle"),
    ],
    ids=["lfs", "page", "empty", "gguf", "zip", "pickle"],
)
def test_a_file_is_named_for_what_it_is(content, reason, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert_load_error(folder, r"model\.safetensors: " + reason)


def test_a_pointer_instead_of_the_configuration(folder):
    (folder / "config.json").write_bytes(POINTER)
    assert_load_error(folder, r"config\.json: is a git-lfs pointer")


def test_a_pointer_instead_of_the_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(POINTER)
    assert_load_error(folder, r"tokenizer\.model: is a git-lfs pointer")


@pytest.mark.parametrize("kept", [0.9, 0.0005], ids=["in the data", "in the header"])
def test_a_file_cut_short_shows_both_sizes(kept, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    count = max(int(len(whole) * kept), 100)
    path.write_bytes(whole[:count])
    expected = len(whole) if kept > 0.5 else 8 + int.from_bytes(whole[:8], "little")
    assert_load_error(folder, f"is cut short: must have {expected} bytes, got {count}; download it again")


def test_a_link_to_a_file_that_is_not_there(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob.incomplete")
    assert_load_error(folder, "points to a file that is not there: the download is not complete")


def test_a_file_instead_of_its_folder(folder):
    assert_load_error(folder / "model.safetensors", "is a file: give the folder that holds it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_checked_on_request(value, dtype, folder):
    tensors = tensors_of(folder)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name][5, 7] = value
    write(folder, tensors)
    load(folder, dtype=dtype)
    reason = f"{name}: holds {'NaN' if value != value else 'inf'} in row 5, column 7"
    assert_load_error(folder, reason, dtype=dtype, check_weights=True)


def test_checking_changes_nothing_in_good_weights(source):
    assert torch.equal(load(source, check_weights=True)[0](IDS), load(source)[0](IDS))


# ---- mistral-finetune -----------------------------------------------------------------------------------------------


def consolidated(folder: Path) -> dict:
    torch.manual_seed(0)
    save_consolidated(random_model(num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16), folder)
    return json.loads((folder / "params.json").read_text())


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


# ---- the Hugging Face cache -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(source, tmp_path) -> Path:
    """A cache as huggingface_hub lays it out, with two revisions of org/tiny."""
    root = tmp_path / "hub"
    repository = root / "models--org--tiny"
    for folder in ("blobs", "refs", "snapshots/0123", "snapshots/4567"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, repository / "blobs" / f"{i}")
        os.symlink(f"../../blobs/{i}", repository / "snapshots" / "0123" / file.name)
    return root


@pytest.mark.parametrize("variables", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_repository_is_found_in_the_cache(variables, cache, source, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    places = {"HF_HUB_CACHE": "hub", "HF_HOME": "home/hub", "XDG_CACHE_HOME": "xdg/huggingface/hub",
              "HOME": ".cache/huggingface/hub"}  # fmt: skip
    values = {"HF_HUB_CACHE": "hub", "HF_HOME": "home", "XDG_CACHE_HOME": "xdg", "HOME": ""}
    place = tmp_path / places[variables]
    place.parent.mkdir(parents=True, exist_ok=True)
    if place != cache:
        cache.rename(place)
    monkeypatch.setenv(variables, str(tmp_path / values[variables]))
    assert assert_same_model("org/tiny", source) == []
    assert mixtral.Config.from_folder("org/tiny").num_layers == 2


def test_the_root_of_a_cached_repository(cache, source):
    assert assert_same_model(cache / "models--org--tiny", source) == []
    (cache / "models--org--tiny" / "refs" / "main").write_text("gone")
    assert_load_error(cache / "models--org--tiny", 'has no snapshot of "main": run `hf download org/tiny`')


def test_a_repository_that_is_not_there_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert_load_error(
        "org/other", r"org/other: is no folder here, and not in the Hugging Face cache .*hub: to download it run "
        "`hf download org/other`"
    )  # fmt: skip
    for path in ("nowhere", "/a/b/c", "./org/tiny", "a b/c"):
        assert_load_error(path, f"{path}: does not exist")


def test_a_folder_of_that_name_goes_before_the_cache(cache, folder, source, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    folder.rename(folder.parent / "org" / "tiny")
    edit(folder.parent / "org" / "tiny", max_position_embeddings=77)
    assert load("org/tiny")[0].config.max_position == 77
