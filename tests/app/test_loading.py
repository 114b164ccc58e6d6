"""The binary on odd checkpoints: warnings on stderr, adapters, checked weights, names of the Hugging Face cache."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from binary import DEMO, edit_config, environment, mixtral, ok, ok_json

PROMPT = ("-p", "In the beginning", "-n", "4")


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def spoil(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("command", [("generate", *PROMPT), ("info",), ("bench", "--new-tokens", "2")], ids=str)
def test_a_warning_is_one_line_on_stderr(command, model):
    edit_config(model, eos_token_id=[2, 4096])
    run = mixtral(command[0], model, *command[1:])
    assert run.returncode == 0 and run.stdout
    expected = f"mixtral: warning: {model}/config.json: eos_token_id: 4096 is not in the vocabulary of 4096"
    assert run.stderr.decode().startswith(expected) and run.stderr.count(b"\n") == 1


def test_a_model_that_is_loaded_twice_warns_once(model):
    edit_config(model, eos_token_id=[2, 4096])
    (model / "text").write_text("In the beginning")
    run = mixtral("perplexity", model, model / "text", "--compare-dtype", "int8")
    assert run.returncode == 0 and run.stderr.count(b"warning") == 1


@pytest.mark.parametrize("command", ["generate", "bench", "perplexity", "quantize"])
def test_weights_are_checked_on_request(command, model, tmp_path):
    spoil(model, "model.layers.0.self_attn.o_proj.weight", float("nan"))
    (tmp_path / "text").write_text("In the beginning")
    rest = {
        "generate": PROMPT,
        "bench": ("--new-tokens", "2"),
        "perplexity": (tmp_path / "text",),
        "quantize": (tmp_path / "out", "--dtype", "int8"),
    }
    run = mixtral(command, model, *rest[command], "--check-weights")
    message = run.stderr.decode()
    assert run.returncode == 3 and message.count("\n") == 1
    assert "model.safetensors: model.layers.0.self_attn.o_proj.weight: holds NaN in row 0, column 3" in message
    assert not (tmp_path / "out").exists()


def test_an_adapter_changes_what_is_generated_and_scored(model, tmp_path):
    torch.manual_seed(0)
    lora = tmp_path / "lora"
    lora.mkdir()
    name = "base_model.model.model.layers.2.self_attn.o_proj"
    a, b = torch.randn(2, 192), torch.randn(192, 2)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    merged = load_file(model / "model.safetensors")
    weight = merged["model.layers.2.self_attn.o_proj.weight"]
    merged["model.layers.2.self_attn.o_proj.weight"] = (weight.float() + b @ a).to(weight.dtype)
    save_file(merged, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text").write_text("In the beginning")
    by_lora, expected, plain = (
        ok_json("perplexity", *arguments, tmp_path / "text")["nats_per_token"]
        for arguments in ((DEMO, "--lora", lora), (model,), (DEMO,))
    )
    assert abs(by_lora - expected) < 1e-3 < abs(by_lora - plain)
    assert ok("generate", DEMO, *PROMPT, "--lora", lora) == ok("generate", model, *PROMPT)


def test_a_repository_in_the_cache_is_a_model(tmp_path):
    repository = tmp_path / "models--org--tiny"
    (repository / "snapshots").mkdir(parents=True)
    os.symlink(DEMO, repository / "snapshots" / "0123")
    env = environment(HF_HUB_CACHE=str(tmp_path))
    assert ok("generate", "org/tiny", *PROMPT, env=env) == ok("generate", DEMO, *PROMPT)
    assert json.loads(ok("info", repository, "--json", env=env)) == ok_json("info", DEMO)
    assert ok("tokenize", "org/tiny", "-p", "a", env=env) == ok("tokenize", DEMO, "-p", "a")
    run = mixtral("generate", "org/other", *PROMPT, env=env)
    assert run.returncode == 3
    assert run.stderr.decode() == (
        f"mixtral: org/other: is no folder here, and not in the Hugging Face cache {tmp_path}: "
        "to download it run `hf download org/other`\n"
    )


def test_a_folder_behind_a_tilde(model, tmp_path):
    env = environment(HOME=str(tmp_path))
    assert ok("tokenize", "~/model", "-p", "a", env=env) == ok("tokenize", DEMO, "-p", "a")
