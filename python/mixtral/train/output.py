"""Folders that appear complete or not at all, and safetensors written a tensor at a time."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .. import _C

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Not of the tokenizer, and made anew for another model, or too large for a description.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx")
_DESCRIPTIONS = ("config.json", "params.json", "quantize_config.json", "adapter_config.json", "upcycle.json")
_MAX_CARRIED_BYTES = 16 << 20


def check_unused(out: Path) -> None:
    """Raises ValueError unless ``out`` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: must not exist or be an empty folder")


def check_space(out: Path, needed: int) -> None:
    """Raises RuntimeError unless the disk that will hold ``out`` has ``needed`` bytes left."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RuntimeError(f"{out}: needs {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB left")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, "OUT.incomplete", which becomes ``out`` at the end; after an error it is gone.

    Raises:
        ValueError: ``out`` is in use (``check_unused``).
    """
    check_unused(out)
    part = out.absolute().with_name(out.absolute().name + ".incomplete")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()  # empty
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def carry_files(source: Path, folder: Path) -> list[str]:
    """Copies what lies beside the weights of ``source``: tokenizer, chat template, licence. Returns their names."""
    carried = []
    for file in sorted(source.iterdir()):
        name = file.name
        described = name in _DESCRIPTIONS or name.endswith((".index.json", ".incomplete", *_WEIGHTS))
        small = file.is_file() and file.stat().st_size <= _MAX_CARRIED_BYTES
        if small and not name.startswith(".") and (name.startswith("tokenizer") or not described):
            shutil.copyfile(file, folder / name)
            carried.append(name)
    return carried


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    parts: Callable[[str], Iterator[Tensor]],
    progress: Callable[[int], None],
) -> None:
    """Writes a file of ``tensors``, names and shapes in the order of the file, never holding one of them whole.

    Args:
        dtype: of all of them: float32, bfloat16 or float16.
        parts: of a tensor's name: its rows, in pieces of ``dtype``.
        progress: called with the bytes written since the last call.
    """
    header, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _ in tensors:
            for part in parts(name):
                written = part.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(written)
                progress(written.nbytes)
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path}: the pieces are not of the announced sizes")


def config_json(config: _C.Config) -> str:
    """config.json of ``config`` as transformers and this project read it."""
    moe = config.is_moe
    fields = {
        "architectures": ["MixtralForCausalLM" if moe else "MistralForCausalLM"],
        "model_type": "mixtral" if moe else "mistral",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.window or None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if moe:
        fields |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.top_k,
            "norm_topk_prob": config.renormalize,
            "router_dtype": "float32" if config.router_in_f32 else "model",
        }
    return json.dumps(fields, indent=2) + "\n"
