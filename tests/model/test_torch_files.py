"""Weights that torch.save wrote, read without Python's pickle: the same model, and nothing executed."""

import argparse
import collections
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixtral
from checkpoints import TINY, random_model, save_consolidated


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return mixtral.Mixtral.from_pretrained(folder).named_parameters()


def assert_same(folder: Path, expected: Path) -> None:
    ours, theirs = parameters(folder), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def safe(tmp_path_factory) -> Path:
    """A Hugging Face folder with safetensors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("safe")
    random_model(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def consolidated(safe, tmp_path_factory) -> Path:
    """The same model in Mistral's layout, with safetensors."""
    folder = tmp_path_factory.mktemp("consolidated")
    torch.manual_seed(0)
    save_consolidated(
        random_model(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16), folder
    )
    return folder


@pytest.fixture
def tensors(safe) -> dict[str, torch.Tensor]:
    return load_file(safe / "model.safetensors")


@pytest.fixture
def folder(safe, tmp_path) -> Path:
    """A Hugging Face folder without weights."""
    shutil.copy(safe / "config.json", tmp_path)
    return tmp_path


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_state_dict_loads_alike(wrapper, tensors, safe, folder):
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, folder / "pytorch_model.bin")
    assert_same(folder, safe)


def test_a_modules_state_dict_loads_alike(tensors, safe, folder):
    """With _metadata, parameters, and entries that are no tensors."""
    state = collections.OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    state["steps"] = 2**40
    state["rate"] = 0.5
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(folder, safe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_float_type_is_read(dtype, tensors, folder):
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    ours = mixtral.Mixtral.from_pretrained(folder, dtype=str(dtype).removeprefix("torch.")).named_parameters()
    assert torch.equal(ours["embed_tokens"], tensors["model.embed_tokens.weight"].to(dtype))


def test_tensors_may_share_a_storage(tensors, safe, folder):
    """As in Mixtral's first release, where those of a layer are cut from one."""
    storage = torch.cat([torch.zeros(3, dtype=torch.bfloat16), *(tensor.flatten() for tensor in tensors.values())])
    cut, offset = {}, 3
    for name, tensor in tensors.items():
        cut[name] = storage[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    torch.save(cut, folder / "pytorch_model.bin")
    assert (folder / "pytorch_model.bin").stat().st_size < 2 * storage.nbytes
    assert_same(folder, safe)


def test_shards_with_an_index_load_alike(tensors, safe, folder):
    names, shards = list(tensors), {}
    for i in range(3):
        shard = f"pytorch_model-0000{i + 1}-of-00003.bin"
        torch.save({name: tensors[name] for name in names[i::3]}, folder / shard)
        shards |= dict.fromkeys(names[i::3], shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert_same(folder, safe)


def test_safetensors_win(tensors, safe, folder):
    shutil.copy(safe / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even opened")
    with pytest.warns(UserWarning, match="model\\*.safetensors is read"):
        assert_same(folder, safe)


# ---- Mistral ---------------------------------------------------------------------------------------------------------


def first_release(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts stacked to [E*I,H], w2 transposed: the layout of Mixtral's files of December 2023."""
    out = {name: tensor for name, tensor in tensors.items() if "feed_forward" not in name}
    for n in range(TINY["num_hidden_layers"]):
        new, old = f"layers.{n}.block_sparse_moe", f"layers.{n}.feed_forward"
        out[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        for w in ("w1", "w2", "w3"):
            experts = [tensors[f"{old}.experts.{m}.{w}.weight"] for m in range(4)]
            out[f"{new}.{w}"] = torch.cat([e.T if w == "w2" else e for e in experts])
    return out


@pytest.mark.parametrize("dtype", ["auto", "float32", "int4"])
@pytest.mark.parametrize("layout", ["one pth", "one pth, stacked", "eight pt, stacked"])
def test_consolidated_files_load_alike(layout, dtype, consolidated, tmp_path):
    config = json.loads((consolidated / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(config))
    state = load_file(consolidated / "consolidated.safetensors")
    if "stacked" in layout:
        state = first_release(state)
    if "eight" in layout:
        for i in range(8):
            torch.save(dict(list(state.items())[i::8]), tmp_path / f"consolidated.0{i}.pt")
    else:
        torch.save(state, tmp_path / "consolidated.00.pth")
    ours = mixtral.Mixtral.from_pretrained(tmp_path, dtype=dtype, pack=False).named_parameters()
    theirs = mixtral.Mixtral.from_pretrained(consolidated, dtype=dtype, pack=False).named_parameters()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_packed_parameters_are_the_same_bits(consolidated, tmp_path):
    shutil.copy(consolidated / "params.json", tmp_path)
    torch.save(first_release(load_file(consolidated / "consolidated.safetensors")), tmp_path / "consolidated.00.pth")
    assert_same(tmp_path, consolidated)


# ---- what is refused -------------------------------------------------------------------------------------------------


def assert_refused(folder: Path, item: str, *words: str) -> None:
    with pytest.raises(mixtral.LoadError) as error:
        mixtral.Mixtral.from_pretrained(folder)
    assert error.value.item == item, str(error.value)
    for word in words:
        assert word in str(error.value)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Malicious(), "__builtin__.getattr"),  # which looks Path.touch up
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (print, "__builtin__.print"),
    ],
    ids=["call", "object", "function"],
)
def test_nothing_but_tensors_is_built(value, name, tensors, folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({**tensors, "extra": value}, folder / "pytorch_model.bin")
    assert_refused(folder, "pickle", "asks Python for", name, "torch.save(model.state_dict(), FILE)")
    assert not (folder / "executed").exists()


def test_strides_that_are_not_row_after_row_are_refused(tensors, folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.save({**tensors, name: tensors[name].T}, folder / "pytorch_model.bin")
    assert_refused(folder, name, "must be contiguous", "tensor.contiguous()")


def test_types_without_use_are_refused_by_the_checkpoint(tensors, folder):
    torch.save({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, folder / "pytorch_model.bin")
    assert_refused(folder, "lm_head.weight", "dtype must be", "got I8")


def test_old_and_other_files_are_refused_in_words(tensors, folder):
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert_refused(folder, "", "before torch 1.6", "torch.save(torch.load(FILE, weights_only=True), FILE)")
    torch.save({"epoch": 3}, file)
    assert_refused(folder, "", "holds no tensor")
    torch.save([tensors], file)
    assert_refused(folder, "", "must hold a dict of tensors")
    torch.save(tensors, file, pickle_protocol=4)
    assert_refused(folder, "pickle", "must have protocol 2")
    shutil.make_archive(str(folder / "archive"), "zip", folder, "config.json")
    (folder / "archive.zip").rename(file)
    assert_refused(folder, "config.json", "must be stored without compression")
