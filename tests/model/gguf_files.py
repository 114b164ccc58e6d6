"""GGUF files of small models, written with llama.cpp's own Python package."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

from checkpoints import interleaved

# Where a block's scales (float16) are, and how large they may be for weights of about 0.2.
SCALES = {
    Type.Q4_0: ([0], 1 / 40),
    Type.Q8_0: ([0], 1 / 600),
    Type.Q4_K: ([0, 2], 1 / 2000),
    Type.Q5_K: ([0, 2], 1 / 4000),
    Type.Q6_K: ([208], 1 / 10000),
}


def random_blocks(generator: np.random.Generator, shape: tuple[int, ...], type: Type) -> np.ndarray:
    """Any block of bytes is valid, but for its scales, which must be finite: uint8 [..., bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    offsets, largest = SCALES[type]
    for offset in offsets:
        scales = generator.uniform(-largest, largest, (*blocks.shape[:-1], 1))
        blocks[..., offset : offset + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def rows_of_float(weight: torch.Tensor, type: Type) -> tuple[np.ndarray, Type]:
    """The weight's data as GGUF stores it: floats rounded to ``type``; vectors and routers stay float32."""
    array = weight.float().numpy()
    type = Type.F32 if array.ndim == 1 else type
    return gguf.quantize(array, type), type


def tensors_of(model: PreTrainedModel, merged: bool = True) -> dict[str, torch.Tensor]:
    """The model's weights under llama.cpp's names, rotary rows interleaved. ``merged``: all experts in one tensor."""
    config, state = model.config, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    out = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        out["output"] = state["lm_head.weight"]
    for n in range(config.num_hidden_layers):
        ours, theirs = f"blk.{n}", f"model.layers.{n}"
        out[f"{ours}.attn_norm"] = state[f"{theirs}.input_layernorm.weight"]
        out[f"{ours}.ffn_norm"] = state[f"{theirs}.post_attention_layernorm.weight"]
        q, k, v, o = (state[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkvo")
        out[f"{ours}.attn_q"] = interleaved(q, config.num_attention_heads)
        out[f"{ours}.attn_k"] = interleaved(k, config.num_key_value_heads)
        out[f"{ours}.attn_v"], out[f"{ours}.attn_output"] = v, o
        if config.model_type == "mistral":
            for name in ("gate", "up", "down"):
                out[f"{ours}.ffn_{name}"] = state[f"{theirs}.mlp.{name}_proj.weight"]
            continue
        out[f"{ours}.ffn_gate_inp"] = state[f"{theirs}.mlp.gate.weight"]
        gate, up = state[f"{theirs}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        experts = {"ffn_gate": gate, "ffn_up": up, "ffn_down": state[f"{theirs}.mlp.experts.down_proj"]}
        for name, stacked in experts.items():
            if merged:
                out[f"{ours}.{name}_exps"] = stacked.contiguous()
            else:
                out |= {f"{ours}.{name}.{e}": stacked[e].contiguous() for e in range(config.num_local_experts)}
    return {f"{name}.weight": tensor for name, tensor in out.items()}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    data_of: Callable[[str, torch.Tensor], tuple[np.ndarray, Type]],
    merged: bool = True,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
) -> None:
    """Write a model. ``data_of(name, weight)`` gives a tensor's data and type; ``edit`` adds metadata."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    edit(writer)
    for name, weight in tensors_of(model, merged).items():
        data, type = data_of(name, weight)
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def set_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """The way back of ``tensors_of``, merged: what a reader of the file must have."""
    config = model.config

    def half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows, hidden = weight.shape
        return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)

    tensors = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    state = {"model.embed_tokens.weight": tensors["token_embd"], "model.norm.weight": tensors["output_norm"]}
    state["lm_head.weight"] = tensors.get("output", tensors["token_embd"])
    for n in range(config.num_hidden_layers):
        ours, theirs = f"blk.{n}", f"model.layers.{n}"
        state[f"{theirs}.input_layernorm.weight"] = tensors[f"{ours}.attn_norm"]
        state[f"{theirs}.post_attention_layernorm.weight"] = tensors[f"{ours}.ffn_norm"]
        state[f"{theirs}.self_attn.q_proj.weight"] = half_split(tensors[f"{ours}.attn_q"], config.num_attention_heads)
        state[f"{theirs}.self_attn.k_proj.weight"] = half_split(tensors[f"{ours}.attn_k"], config.num_key_value_heads)
        state[f"{theirs}.self_attn.v_proj.weight"] = tensors[f"{ours}.attn_v"]
        state[f"{theirs}.self_attn.o_proj.weight"] = tensors[f"{ours}.attn_output"]
        state[f"{theirs}.mlp.gate.weight"] = tensors[f"{ours}.ffn_gate_inp"]
        gate_up = [tensors[f"{ours}.ffn_gate_exps"], tensors[f"{ours}.ffn_up_exps"]]
        state[f"{theirs}.mlp.experts.gate_up_proj"] = torch.cat(gate_up, dim=1)
        state[f"{theirs}.mlp.experts.down_proj"] = tensors[f"{ours}.ffn_down_exps"]
    model.load_state_dict(state)
