"""Small models for the tests of training: random configurations, batches, and twins in transformers."""

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mixtral.model import Config
from mixtral.train import Batch, Mixtral, RouterOptions

CROSS_ENTROPY_ALONE = RouterOptions(balance="none", z_coefficient=0.0)


def small_config(**fields: object) -> Config:
    """Top-2 of four experts, grouped-query heads, odd sizes."""
    usual: dict[str, object] = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "vocab_size": 101,
        "max_position": 128,
        "num_experts": 4,
        "top_k": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    return Config(**(usual | fields))


DENSE = {"num_experts": 0, "top_k": 0}
SWITCH = {"top_k": 1, "renormalize": False}


def random_config(seed: int) -> Config:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    experts = draw.choice([0, 1, 3, 8])
    return small_config(
        hidden_size=draw.choice([24, 33, 64, 130]),
        intermediate_size=draw.choice([17, 32, 96]),
        num_layers=draw.choice([1, 2, 3]),
        num_heads=kv_heads * draw.choice([1, 2, 4]),
        num_kv_heads=kv_heads,
        head_dim=draw.choice([6, 16, 32]),
        vocab_size=draw.choice([50, 97, 128]),
        num_experts=experts,
        top_k=draw.choice([1, min(2, experts), experts]) if experts else 0,
        window=draw.choice([0, 3, 7]),
        rope_theta=draw.choice([1e4, 1e6]),
        renormalize=draw.random() < 0.5,
        router_in_f32=draw.random() < 0.7,
        tie_word_embeddings=draw.random() < 0.4,
        select_bias=experts > 0 and draw.random() < 0.3,
    )


def random_batch(config: Config, lengths: tuple[int, ...] = (9, 2, 30, 17), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.from_documents(
        [torch.randint(config.vocab_size, (n + 1,), generator=generator).tolist() for n in lengths]
    )


def livelier(model: Mixtral, seed: int = 0) -> Mixtral:
    """The model with weights so large that attention, routing and experts matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_((weight.dim() == 1) + spread * torch.randn(weight.shape, generator=generator))
    return model


def in_transformers(model: Mixtral, folder: Path, **options: object) -> torch.nn.Module:
    """The same weights in transformers, f32."""
    model.save_pretrained(folder)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"} | options
    if not model.config.is_moe:
        del options["experts_implementation"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
