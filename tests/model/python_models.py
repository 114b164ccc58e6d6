"""The models that the tests of the Python interface share."""

from functools import lru_cache
from pathlib import Path

import mixtral

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"


def tiny_config(**overrides) -> mixtral.Config:
    fields = dict(
        hidden_size=64,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=96,
        max_position=512,
        num_experts=4,
        top_k=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        window=8,
        dtype="float32",
    )
    return mixtral.Config(**{**fields, **overrides})


@lru_cache
def demo_model() -> mixtral.Mixtral:
    return mixtral.Mixtral.from_pretrained(DEMO, dtype="float32")


@lru_cache
def tiny_model() -> mixtral.Mixtral:
    return mixtral.Mixtral.from_config(tiny_config())
