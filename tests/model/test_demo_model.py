"""The bundled model is small, complete and trained: it predicts English of its two kinds far better than chance."""

import math
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral import long_context
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


@pytest.mark.parametrize(("dtype", "allowed"), [("int8", 0.003), ("fp8", 0.01), ("int4", 0.05)])
@pytest.mark.parametrize("domain", TEXTS)
def test_quantised_weights_predict_nearly_as_well(domain, dtype, allowed):
    ratio = held_out_bits_per_byte(domain, dtype) / held_out_bits_per_byte(domain, "bfloat16")
    assert abs(ratio - 1) < allowed


BIBLE_WORDS, SQLITE_WORDS = (
    r"\b(LORD|God|king|Israel|heaven|earth|unto)\b",
    r"\b(SQLite|SQL|database|table|SELECT|function)\b",
)


@pytest.mark.parametrize("prompt", ["In the beginning", "Genesis 51\n\n"])
def test_the_beginning_of_a_chapter_continues_as_scripture(prompt):
    text = demo_model().generate(prompt, max_tokens=48)[0].text
    assert re.search(BIBLE_WORDS, text) and not re.search(SQLITE_WORDS, text)


@pytest.mark.parametrize("prompt", ["SQLite Frequently Asked Questions\n\n", "The SELECT statement"])
def test_the_beginning_of_a_page_continues_as_documentation(prompt):
    text = demo_model().generate(prompt, max_tokens=48)[0].text
    assert re.search(SQLITE_WORDS, text) and not re.search(BIBLE_WORDS, text)


def test_finds_every_key_inside_its_window_and_none_beyond_its_reach():
    """The window must hold the whole key when the answer begins; 5 digits and some punctuation."""
    model = demo_model()
    window, reach = model.config.window, model.config.num_layers * (model.config.window - 1)
    cells = long_context.passkey(model, [128, 192, 256, 640], depths=11, trials=10, distances=0)["cells"]
    inside = [cell for cell in cells if cell["distance"] < window - 8]
    beyond = [cell for cell in cells if cell["distance"] > reach]
    assert len(inside) >= 20 and all(cell["correct"] == cell["trials"] for cell in inside)
    assert len(beyond) >= 1 and sum(cell["correct"] for cell in beyond) <= 0.01 * sum(cell["trials"] for cell in beyond)


@pytest.mark.parametrize("domain", TEXTS)
def test_more_context_never_hurts(domain):
    """Fixed targets; the text of one document, so the standard errors are over tokens."""
    text = (HELD_OUT / f"{domain}.txt").read_text()
    rows = long_context.perplexity(demo_model(), text, [64, 128, 256, 512], targets="last:256")["contexts"]
    assert all(row["change"]["nll"] <= 2 * row["change"]["standard_error"] for row in rows[1:])
    assert rows[-1]["nll"] < rows[0]["nll"]


def test_fits_the_repository():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 12e6


def test_text_stays_varied_past_the_window():
    """The rolling buffer wraps several times and the text does not collapse."""
    model = demo_model()
    result = model.generate(
        "And it came to pass", max_tokens=3 * model.config.window, ignore_eos=True, seed=1, temperature=0.8
    )
    assert len(set(result[0].token_ids)) > 60
