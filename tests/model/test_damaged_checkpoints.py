"""Checkpoints that cannot be loaded, and what is said of them: other quantisations, downloads that went wrong, NaN."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import with_threads
from odd_checkpoints import (
    IDS,
    INDEX,
    assert_load_error,
    edit,
    load,
    shards,
    tensors_of,
    write,
)
from random_models import Shape, write_checkpoint

pytest_plugins = ["checkpoint_fixtures"]

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


def test_a_page_instead_of_the_index(folder):
    shards(folder, tensors_of(folder))
    (folder / INDEX).write_text("<!DOCTYPE html><html>")
    assert_load_error(folder, r"index\.json: is a web page")


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


def test_the_first_wrong_row_is_named_whatever_thread_finds_one(tmp_path):
    shape = Shape(hidden=64, layers=1, heads=1, kv_heads=1, head_dim=64, intermediate=32)
    folder = write_checkpoint(shape, tmp_path / "model")
    file, name = folder / "model-00002-of-00002.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    tensors[name][10000::200, 4] = float("nan")  # of 4 MB, which threads read in parts of 256 KiB
    save_file(tensors, file)
    reason = f"{name}: holds NaN in row 10000, column 4"
    for _ in range(5):
        with_threads(4, lambda: assert_load_error(folder, reason, check_weights=True))


def test_checking_changes_nothing_in_good_weights(source):
    assert torch.equal(load(source, check_weights=True)[0](IDS), load(source)[0](IDS))
