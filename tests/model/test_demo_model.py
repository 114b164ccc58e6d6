"""The bundled model is small, complete and trained: it predicts English of its two kinds far better than chance."""

import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import mixtral
from python_models import DEMO, demo_model

# Luke 15, and a page of the SQLite documentation: whole documents of the held-out set.
HELD_OUT = Path(__file__).resolve().parents[1] / "data" / "held_out"

# Luke was held out of its training; the other is written in the manner of the SQLite documentation.
TEXTS = {
    "bible": "And it came to pass in those days, that there went out a decree from Caesar Augustus, that all the world "
    "should be taxed. And all went to be taxed, every one into his own city.",
    "sqlite": "The CREATE TABLE statement is used to create a new table in an SQLite database. The name of the table "
    "is given after the TABLE keyword, and each column has a name and a data type.",
}


def bits_per_byte(text: str) -> float:
    model = demo_model()
    ids = torch.tensor([model.tokenizer.encode(text, add_bos=True)])
    logprobs = model(ids)[0, :-1].log_softmax(-1)
    nats = -logprobs.gather(1, ids[0, 1:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


@pytest.mark.parametrize("domain", TEXTS)
def test_predicts_english(domain):
    text = TEXTS[domain]
    scrambled = " ".join(sorted(text.split()))
    assert bits_per_byte(text) < 1.9  # a uniform guess over the vocabulary is about 4
    assert bits_per_byte(scrambled) > bits_per_byte(text) + 0.5


@lru_cache
def held_out_bits_per_byte(domain: str, dtype: str) -> float:
    text = (HELD_OUT / f"{domain}.txt").read_text()
    return mixtral.Mixtral.from_pretrained(DEMO, dtype=dtype).perplexity(text).bits_per_byte


@pytest.mark.parametrize(("dtype", "allowed"), [("int8", 0.003), ("fp8", 0.005), ("int4", 0.02)])
@pytest.mark.parametrize("domain", TEXTS)
def test_quantised_weights_predict_nearly_as_well(domain, dtype, allowed):
    ratio = held_out_bits_per_byte(domain, dtype) / held_out_bits_per_byte(domain, "bfloat16")
    assert abs(ratio - 1) < allowed


def test_fits_the_repository():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 12e6


def test_text_stays_varied_past_the_window():
    """The rolling buffer wraps several times and the text does not collapse."""
    model = demo_model()
    result = model.generate(
        "And it came to pass", max_tokens=3 * model.config.window, ignore_eos=True, seed=1, temperature=0.8
    )
    assert len(set(result[0].token_ids)) > 60
