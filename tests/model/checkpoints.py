"""Random tiny models in transformers, and the consolidated layout written from them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

TINY = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    initializer_range=0.2,  # larger than in training: differences between tokens and experts become visible
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)


def random_model(dense: bool = False, **overrides) -> PreTrainedModel:
    """A random Mixtral (or Mistral, its dense twin) in f32; the rotary base is 1e4 unless given."""
    settings = {"sliding_window": None, **TINY, **overrides}
    config = MistralConfig(**settings) if dense else MixtralConfig(**settings)
    return (
        (MistralForCausalLM if dense else MixtralForCausalLM)
        ._from_config(config, attn_implementation="eager", experts_implementation="eager")
        .eval()
    )


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """q or k rows from the half-split rotary layout of Hugging Face to the interleaved one of consolidated files."""
    rows, hidden = weight.shape
    return weight.view(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden).contiguous()


def save_consolidated(model: PreTrainedModel, folder: Path) -> None:
    """Write params.json and consolidated.safetensors with the weights of a Mixtral ``model``."""
    config, state = model.config, model.state_dict()
    params = dict(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        head_dim=config.head_dim,
        hidden_dim=config.intermediate_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        rope_theta=config.rope_parameters["rope_theta"],
        max_seq_len=config.max_position_embeddings,
        moe=dict(num_experts=config.num_local_experts, num_experts_per_tok=config.num_experts_per_tok),
    )
    if config.sliding_window:
        params["sliding_window"] = config.sliding_window
    out = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for n in range(config.num_hidden_layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        out[f"{ours}.attention_norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        out[f"{ours}.ffn_norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        out[f"{ours}.attention.wq.weight"] = interleaved(
            state[f"{theirs}.self_attn.q_proj.weight"], config.num_attention_heads
        )
        out[f"{ours}.attention.wk.weight"] = interleaved(
            state[f"{theirs}.self_attn.k_proj.weight"], config.num_key_value_heads
        )
        out[f"{ours}.attention.wv.weight"] = state[f"{theirs}.self_attn.v_proj.weight"]
        out[f"{ours}.attention.wo.weight"] = state[f"{theirs}.self_attn.o_proj.weight"]
        out[f"{ours}.feed_forward.gate.weight"] = state[f"{theirs}.mlp.gate.weight"]
        for e in range(config.num_local_experts):
            gate, up = state[f"{theirs}.mlp.experts.gate_up_proj"][e].chunk(2)
            expert = f"{ours}.feed_forward.experts.{e}"
            out[f"{expert}.w1.weight"], out[f"{expert}.w3.weight"] = gate.contiguous(), up.contiguous()
            out[f"{expert}.w2.weight"] = state[f"{theirs}.mlp.experts.down_proj"][e].contiguous()
    (folder / "params.json").write_text(json.dumps(params))
    save_file({name: tensor.clone() for name, tensor in out.items()}, folder / "consolidated.safetensors")
