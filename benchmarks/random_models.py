"""Random Mixtral checkpoints of a few named shapes, for the benchmarks: speed does not depend on what weights say."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import mixtral

NORM_EPS = 1e-5
ROPE_THETA = 1e6
MAX_POSITION = 4096


BYTES_PER_WEIGHT = {"bfloat16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.53125}  # int4: a byte of scale for every 32


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and what follows from them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int = 8
    top_k: int = 2
    vocab: int = 32000

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """All of them; the norms, a few thousand, are left out."""
        layer = self.attention_weights + self.experts * (self.expert_weights + self.hidden)
        return self.layers * layer + 2 * self.vocab * self.hidden

    def weight_bytes(self, dtype: str) -> float:
        """Of all weights; the embedding and the routers stay in bf16."""
        kept = self.vocab * self.hidden + self.layers * self.experts * self.hidden
        return 2 * kept + BYTES_PER_WEIGHT[dtype] * (self.weights - kept)

    @property
    def weights_per_token(self) -> int:
        """Read to decode one token: no embedding but a row, and top_k of the experts."""
        layer = self.attention_weights + self.experts * self.hidden + self.top_k * self.expert_weights
        return self.layers * layer + self.vocab * self.hidden

    def prefill_flop(self, tokens: int) -> float:
        """Of one prompt: two per weight and token (lm_head: last token only), and causal attention."""
        matmuls = 2 * tokens * (self.weights_per_token - self.vocab * self.hidden) + 2 * self.vocab * self.hidden
        return matmuls + self.layers * 2 * self.heads * self.head_dim * tokens * (tokens + 1)

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of ``tokens`` positions, two bytes each."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * tokens


SHAPES = {
    "mini": Shape(hidden=512, layers=8, heads=8, kv_heads=2, head_dim=64, intermediate=1792),
    "small": Shape(hidden=1536, layers=6, heads=12, kv_heads=4, head_dim=128, intermediate=5376),
    "mid": Shape(hidden=2048, layers=8, heads=16, kv_heads=4, head_dim=128, intermediate=7168),
    "wide2": Shape(hidden=4096, layers=2, heads=32, kv_heads=8, head_dim=128, intermediate=14336),
}
MIXTRAL_8X7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336)


def model_config(shape: Shape, max_position: int = MAX_POSITION) -> "mixtral.Config":
    """Of a model that ``mixtral.Mixtral.from_config`` draws."""
    return mixtral.Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position=max_position,
        num_experts=shape.experts,
        top_k=shape.top_k,
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
    )


def config_of(shape: Shape) -> dict:
    """config.json."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "vocab_size": shape.vocab,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shards_of(shape: Shape, seed: int) -> Iterator[dict[str, Tensor]]:
    """One shard for each layer, and one for the rest: bf16 tensors under the names of the released checkpoints."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def norm() -> Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for n in range(shape.layers):
        layer = f"model.layers.{n}"
        shard = {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": normal(query, shape.hidden),
            f"{layer}.self_attn.k_proj.weight": normal(key, shape.hidden),
            f"{layer}.self_attn.v_proj.weight": normal(key, shape.hidden),
            f"{layer}.self_attn.o_proj.weight": normal(shape.hidden, query),
            f"{layer}.block_sparse_moe.gate.weight": normal(shape.experts, shape.hidden),
        }
        for e in range(shape.experts):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shard[f"{expert}.w1.weight"] = normal(shape.intermediate, shape.hidden)
            shard[f"{expert}.w2.weight"] = normal(shape.hidden, shape.intermediate)
            shard[f"{expert}.w3.weight"] = normal(shape.intermediate, shape.hidden)
        yield shard
    yield {
        "model.embed_tokens.weight": normal(shape.vocab, shape.hidden),
        "model.norm.weight": norm(),
        "lm_head.weight": normal(shape.vocab, shape.hidden),
    }


def write_checkpoint(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write the model into ``folder``, holding one shard at a time; a complete one is kept. Returns ``folder``."""
    config = folder / "config.json"
    if config.exists():  # written last
        if json.loads(config.read_text()) != config_of(shape):
            raise ValueError(f"write_checkpoint: {folder} must hold the same shape, got another config.json")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    count, size, weight_map = shape.layers + 1, 0, {}
    for n, shard in enumerate(shards_of(shape, seed), start=1):
        file = f"model-{n:05d}-of-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
        print(f"  {folder.name}: {file}, {size / 1e9:.2f} GB so far", flush=True)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config.write_text(json.dumps(config_of(shape), indent=1) + "\n")
    return folder


def quantised_checkpoint(folder: Path, dtype: str) -> Path:
    """What `mixtral quantize` makes of the model, in a folder beside it; one that is there is kept."""
    quantised = folder.with_name(f"{folder.name}-{dtype}")
    if not quantised.exists():
        command = [sys.executable, "-m", "mixtral", "quantize", folder, quantised, "--dtype", dtype]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return quantised
