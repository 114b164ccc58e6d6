"""What `mixtral quantize` takes from the source beside its weights, and who must not read the result."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import mixtral as python_mixtral
from binary import DEMO, ROOT, mixtral, ok

TEXT = ROOT / "tests" / "data" / "held_out" / "bible.txt"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """The demo model in int4; the name of the folder is the dtype."""
    out = tmp_path_factory.mktemp("quantized") / "int4"
    ok("quantize", DEMO, out, "--dtype", "int4")
    return out


def test_small_files_come_along_and_weights_do_not(tmp_path):
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    kept = {
        "generation_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "LICENSE": "free",
        "notes.txt": "notes",
    }
    left = ["consolidated.00.pth", "pytorch_model.bin", "x.gguf", "params.json", ".gitattributes", "model.incomplete"]
    left += ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
    for name in left:
        (model / name).write_text("left behind")
    for name, text in kept.items():
        (model / name).write_text(text)
    (model / "large.txt").write_bytes(bytes((16 << 20) + 1))
    (model / "folder").mkdir()
    (model / "LICENSE").rename(tmp_path / "blob")  # as in a Hugging Face cache
    (model / "LICENSE").symlink_to(tmp_path / "blob")
    (model / "gone.txt").symlink_to(tmp_path / "nowhere")
    run = mixtral("quantize", model, tmp_path / "out", "--dtype", "int4")
    assert run.returncode == 0 and b"model.safetensors alone is read" in run.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in DEMO.iterdir()} | kept.keys()
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def test_transformers_refuses_the_folder(quantized):
    """It would fill a model with random values where it does not know the kind of quantisation."""
    for model in (AutoModelForCausalLM, MixtralForCausalLM):
        with pytest.raises(ValueError, match="quant_method"):
            model.from_pretrained(quantized)


@pytest.mark.parametrize(
    "arguments", [("int8",), ("int4",), ("int4", "--calibrate", TEXT)], ids=["int8", "int4", "gptq"]
)
def test_an_adapter_is_merged_before_rounding(arguments, tmp_path):
    """The same bytes as from a checkpoint with W + s B A in float32."""
    torch.manual_seed(0)
    name = "model.layers.1.self_attn.o_proj"
    a, b = torch.randn(2, 192) * 0.1, torch.randn(192, 2) * 0.1
    lora = tmp_path / "lora"
    lora.mkdir()
    adapter = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(adapter, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    merged = Path(shutil.copytree(DEMO, tmp_path / "merged"))
    exact = python_mixtral.Mixtral.from_pretrained(DEMO, dtype="float32", pack=False, lora=lora).named_parameters()
    tensors = load_file(DEMO / "model.safetensors")
    assert torch.allclose(exact["layers.1.attention.o_proj"], tensors[f"{name}.weight"].float() + 4 / 2 * b @ a)
    tensors[f"{name}.weight"] = exact["layers.1.attention.o_proj"].clone()
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    ok("quantize", DEMO, tmp_path / "ours", "--lora", lora, "--dtype", *arguments)
    ok("quantize", merged, tmp_path / "theirs", "--dtype", *arguments)
    ours, theirs = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("ours", "theirs"))
    assert ours == theirs


def test_an_adapter_over_quantised_weights_is_refused(quantized, tmp_path):
    message = f"lora needs a checkpoint that is not quantised, got {quantized.name}"
    run = mixtral("generate", quantized, "-p", "a", "--lora", tmp_path)
    assert (
        run.returncode == 2
        and run.stderr.count(b"\n") == 1
        and f"{message}: quantise the original" in run.stderr.decode()
    )
    with pytest.raises(ValueError, match=message):
        python_mixtral.Mixtral.from_pretrained(quantized, lora=tmp_path)
