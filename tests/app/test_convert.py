"""`mixtral convert`: any checkpoint in, a Hugging Face folder out, and the same numbers."""

import json
import os
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

import mixtral as python_mixtral
from binary import DEMO, mixtral, ok
from checkpoints import random_model, save_consolidated
from gguf_files import rows_of_float, write_gguf

IDS = torch.arange(1, 40).reshape(1, -1)


def load(path: Path, dtype: str = "auto") -> python_mixtral.Mixtral:
    return python_mixtral.Mixtral.from_pretrained(path, dtype=dtype)


def assert_same(ours: Path, theirs: Path) -> None:
    a, b = load(ours), load(theirs)
    assert a.named_parameters().keys() == b.named_parameters().keys()
    for name, weight in a.named_parameters().items():
        assert torch.equal(weight, b.named_parameters()[name]), name
    assert torch.equal(a(IDS), b(IDS))


def test_a_hugging_face_folder_comes_back_as_it_was(tmp_path):
    ok("convert", DEMO, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(DEMO / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    files = {path.name for path in DEMO.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for name in files - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (DEMO / name).read_bytes()
    assert_same(tmp_path / "out", DEMO)


def test_transformers_loads_the_result(tmp_path):
    ok("convert", DEMO, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_asked_for(dtype, tmp_path):
    ok("convert", DEMO, tmp_path / "out", "--dtype", dtype)
    source = load_file(DEMO / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, source[name].to(getattr(torch, dtype))), name
    assert python_mixtral.Config.from_folder(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize("layout", ["consolidated", "pickle", "merged"])
def test_every_layout_becomes_the_same_folder(layout, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    source = tmp_path / "source"
    source.mkdir()
    if layout == "merged":
        model.save_pretrained(source, save_original_format=False)
    else:
        save_consolidated(model, source)
    if layout == "pickle":
        torch.save(load_file(source / "consolidated.safetensors"), source / "consolidated.00.pth")
        (source / "consolidated.safetensors").unlink()
    shutil.copy(DEMO / "tokenizer.model", source)
    ok("convert", source, tmp_path / "out")
    expected = {"config.json", "model.safetensors", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"generation_config.json"} == expected
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(DEMO / "model.safetensors")[name]), name


def test_a_dense_model_with_a_tied_head(tmp_path):
    random_model(dense=True, tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    ok("convert", tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "source")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = gguf.SentencePieceVocab
    tokens, scores, types = zip(*vocabulary(DEMO).all_tokens(), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(types))
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    write_gguf(
        path, model, lambda name, weight: rows_of_float(weight, Type.BF16),
        edit=lambda writer: (add_tokenizer(writer), writer.add_sliding_window(128)),
    )  # fmt: skip
    return path


def test_gguf_becomes_a_folder_with_its_tokenizer(gguf_file, tmp_path):
    out = tmp_path / "out"
    ok("convert", gguf_file, out)
    assert_same(out, DEMO)
    ours, theirs = python_mixtral.Tokenizer(out), python_mixtral.Tokenizer(gguf_file)
    library = [SentencePieceProcessor(str(folder / "tokenizer.model")) for folder in (out, DEMO)]
    for text in ("Once upon a time", "  two  spaces\n", "naïve 🦄", "</s>"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text, parse_special=True)
        assert library[0].encode(text) == library[1].encode(text)
    assert (out / "chat_template.jinja").read_text() == "{{ bos_token }}{{ messages[0].content }}"
    arguments = ["-p", "Once upon", "-n", "8"]
    assert ok("generate", out, *arguments) == ok("generate", gguf_file, *arguments) == ok("generate", DEMO, *arguments)


def test_gguf_is_quantised_as_the_folder_is(gguf_file, tmp_path):
    ok("quantize", gguf_file, tmp_path / "gguf", "--dtype", "int4")
    ok("quantize", DEMO, tmp_path / "folder", "--dtype", "int4")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("gguf", "folder"))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert (tmp_path / "gguf" / "tokenizer.model").exists()


def test_info_describes_a_gguf_file(gguf_file):
    info = json.loads(ok("info", gguf_file, "--json"))
    assert info["layout"] == "gguf" and info["checkpoint_dtype"] == "bfloat16"
    assert info["window_source"] == "demo.gguf: llama.attention.sliding_window"


# ---- what fails ------------------------------------------------------------------------------------------------------


def assert_fails(code: int, *arguments: str | Path, words: list[str]) -> None:
    run = mixtral("convert", *arguments)
    message = run.stderr.decode()
    assert run.returncode == code and message.count("\n") == 1, message
    for word in words:
        assert word in message


def test_what_cannot_be_converted_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out"
    ok("quantize", DEMO, tmp_path / "int4", "--dtype", "int4")
    assert_fails(2, tmp_path / "int4", out, words=["is quantised to int4", "the checkpoint that it was made from"])
    assert_fails(2, DEMO, tmp_path, words=["must not exist or be an empty folder"])
    assert_fails(2, DEMO, out, "--dtype", "int8", words=["int8"])
    assert_fails(5, DEMO, "/proc/nowhere/out", words=["cannot be written"])
    damaged = Path(shutil.copytree(DEMO, tmp_path / "damaged"))
    os.truncate(damaged / "model.safetensors", 100_000)
    assert_fails(3, damaged, out, words=["model.safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {"int4", "damaged"}
