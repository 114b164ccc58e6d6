"""Perplexity: against the loss of transformers, and how the result depends, or does not, on chunks and context."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import mixtral
from checkpoints import random_model
from python_models import DEMO, demo_model, tiny_model

TEXT = "And it came to pass in those days, that there went out a decree from Caesar Augustus, " * 4


@pytest.mark.parametrize("ctx_size", [0, 40])
@pytest.mark.parametrize("window", [None, 6])
def test_equals_the_loss_of_transformers(window, ctx_size, tmp_path, device):
    theirs = random_model(vocab_size=4096, sliding_window=window)
    theirs.save_pretrained(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    ours = mixtral.Mixtral.from_pretrained(tmp_path, device=device, dtype="float32")
    score = ours.perplexity(TEXT, ctx_size=ctx_size, chunk_size=16)

    ids = torch.tensor(ours.tokenizer.encode(TEXT))
    bos = torch.tensor([ours.tokenizer.bos_id])
    nats = 0.0
    for segment in ids.split(ctx_size or len(ids)):
        with torch.no_grad():
            logits = theirs(torch.cat([bos, segment])[None]).logits[0, :-1]
        nats += F.cross_entropy(logits.double(), segment, reduction="sum").item()
    assert (score.tokens, score.bytes) == (len(ids), len(TEXT.encode()))
    assert score.nats_per_token == pytest.approx(nats / len(ids), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nats_per_token), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.bytes, rel=1e-5)


def test_chunks_do_not_change_a_bit():
    expected = demo_model().perplexity(TEXT).nats_per_token
    assert {demo_model().perplexity(TEXT, chunk_size=size).nats_per_token for size in (1, 17, 64)} == {expected}


def test_more_context_predicts_better():
    scores = [demo_model().perplexity(TEXT, ctx_size=size).bits_per_byte for size in (4, 16, 64)]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] + 0.3


def test_bytes_are_those_of_utf8():
    assert demo_model().perplexity("é").bytes == 2


def test_repr_shows_the_numbers():
    score = demo_model().perplexity("Once")
    assert f"{score.perplexity:.4f}" in repr(score) and f"{score.tokens} tokens" in repr(score)


def test_wrong_arguments_are_value_errors():
    with pytest.raises(ValueError, match="text must not be empty"):
        demo_model().perplexity("")
    with pytest.raises(ValueError, match="chunk_size must be > 0, got 0"):
        demo_model().perplexity("a", chunk_size=0)
    with pytest.raises(ValueError, match="ctx_size must be >= 0, got -1"):
        demo_model().perplexity("a", ctx_size=-1)
    with pytest.raises(ValueError, match="expected a tokenizer"):
        tiny_model().perplexity("a")
