"""Folders of models: the names of the weights in each format, and reading and writing them.

The names of the module are those of transformers 5. All reading is done by the C++ model, so that one reader knows all
formats and all their faults.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LoadError
from ..model import _C, Config

if TYPE_CHECKING:
    from .model import Mixtral

FORMATS = ("huggingface", "huggingface_v4", "consolidated")
MAX_SHARD_BYTES = 5_000_000_000

# Pieces of names in transformers 5, and what they are called elsewhere.
_CONSOLIDATED = {
    "model.layers.": "layers.",
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.": ".feed_forward.",
}
_V4 = {".mlp.gate.": ".block_sparse_moe.gate.", ".mlp.experts.": ".block_sparse_moe.experts."}
_CPP = {
    ".attention.": ".self_attn.",
    ".moe.router": ".mlp.gate.weight",
    ".moe.select_bias": ".mlp.gate.e_score_correction_bias",
    ".moe.": ".mlp.experts.",
}


def _renamed(name: str, pieces: dict[str, str]) -> str:
    for piece, other in pieces.items():
        name = name.replace(piece, other)
    return name


def float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """ "float32", "bfloat16" or "float16" as torch's dtype; ValueError for another."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return found


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """ValueError for a token outside the vocabulary; on CUDA the lookup itself stops."""
    if input_ids.is_cpu and not torch.compiler.is_compiling() and input_ids.numel() > 0:
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"token ids must be in [0, {vocab_size}), got {wrong}: the text was encoded for another model"
            )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(
    cls: type["Mixtral"],
    path: str | PathLike[str],
    dtype: torch.dtype | str,
    device: torch.device | str,
    lora: str | PathLike[str] | None = None,
    **options,
) -> "Mixtral":
    """``Mixtral.from_pretrained``."""
    folder = _C.find_model(path)
    name = dtype if dtype == "auto" else dtype_name(float_dtype(dtype))
    config = Config.from_folder(folder)
    if config.quantization:
        item, reason = "quantization_config", f"a model in {config.quantization} cannot be trained: take its original"
        raise LoadError(f"{folder}: {item}: {reason}", str(folder), item, reason)
    # One copy in memory: what is not split stays where the C++ model has put it.
    source = _C.Mixtral.from_pretrained(folder, torch.device(device), name, pack=False, lora=lora or "")
    with torch.device("meta"):
        model = cls(source.config, **options)
    weights = dict(_from_cpp(source.config, source.named_parameters()))
    for buffer, value in model.named_buffers():  # the biases that "loss_free" adds to a model
        weights.setdefault(buffer, torch.zeros(value.shape, device=device))
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_()
    model.folder = folder
    return model


def _from_cpp(config: Config, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the C++ model (csrc/model/parameters.h) under the module's names."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, tensor in parameters.items():
        path = name if name == "lm_head" else "model." + _renamed(name, _CPP)
        if name.endswith("qkv_proj"):
            parts = zip("qkv", tensor.split([queries, keys, keys]), strict=True)
            yield from ((path.replace("qkv_proj", f"{part}_proj.weight"), rows.clone()) for part, rows in parts)
        elif name.endswith("mlp.gate_up_proj"):
            gate, up = tensor[0].chunk(2)
            yield path.replace("gate_up_proj", "gate_proj.weight"), gate.clone()
            yield path.replace("gate_up_proj", "up_proj.weight"), up.clone()
        elif name.endswith("mlp.down_proj"):
            yield path + ".weight", tensor[0]
        elif ".moe." in name:
            yield path, tensor
        else:
            yield path + ".weight", tensor
            if name == "embed_tokens" and config.tie_word_embeddings:
                yield "lm_head.weight", tensor


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(model: "Mixtral", folder: str | PathLike[str], format: str, state: dict[str, Tensor]) -> None:
    """``Mixtral.save_pretrained``."""
    if format not in FORMATS:
        raise ValueError(f"save_pretrained: format must be one of {', '.join(FORMATS)}, got {format!r}")
    final = Path(folder).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"save_pretrained: {folder} must not exist or be an empty folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    incomplete = Path(tempfile.mkdtemp(prefix=f"{final.name}.incomplete-", dir=final.parent))
    try:
        config = model.config
        config.dtype = dtype_name(model.model.embed_tokens.weight.dtype)
        consolidated = format == "consolidated"
        text = config.params_json() if consolidated else config.config_json()
        (incomplete / ("params.json" if consolidated else "config.json")).write_text(text)
        if model.folder is not None:
            _C.carry_files(model.folder, incomplete)
        weights = _named_for(format, config, state)
        _write_shards(weights, incomplete, "consolidated" if consolidated else "model", not consolidated)
        incomplete.chmod(0o777 & ~_umask())
        os.rename(incomplete, final)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _named_for(format: str, config: Config, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint in ``format``."""
    pieces = {"huggingface": {}, "huggingface_v4": _V4, "consolidated": _CONSOLIDATED}[format]
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        path = _renamed(name, pieces)
        if format == "consolidated" and name.endswith(("q_proj.weight", "k_proj.weight")):
            yield path, _interleaved(tensor, config.head_dim)
        elif format == "huggingface" or ".experts." not in name:
            yield path, tensor
        else:
            prefix, matrix = path.rsplit(".", 1)
            for e, rows in enumerate(tensor):
                parts = {"w1": rows.chunk(2)[0], "w3": rows.chunk(2)[1]} if matrix == "gate_up_proj" else {"w2": rows}
                yield from ((f"{prefix}.{e}.{part}.weight", value) for part, value in parts.items())


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rotary rows of each head from the order 0, 2, 4, ..., 1, 3, 5, ... to 0, 1, 2, ..."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, stem: str, may_split: bool) -> None:
    """Safetensors files of at most ``MAX_SHARD_BYTES`` each, with an index if there is more than one."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        if may_split and size > 0 and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in zip(names, shards, strict=True):
        save_file({k: x.detach().cpu().clone() for k, x in shard.items()}, folder / name, metadata={"format": "pt"})
