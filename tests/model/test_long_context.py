"""Loss by context, passkeys and reach from Python: against logits, scipy and the definitions of other programs."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

import attention_figures
import mixtral
from mixtral import figures, long_context
from python_models import ROOT, demo_model, tiny_config, tiny_model

TEXT = (ROOT / "tests" / "data" / "held_out" / "bible.txt").read_text()[:1600]
SVG = "{http://www.w3.org/2000/svg}"


def nll_of(model: mixtral.Mixtral, window: list[int], count: int) -> torch.Tensor:
    """f64 [count]: of the last ``count`` tokens of a window, in one pass without a cache."""
    logits = model(torch.tensor([window[:-1]]))[0, -count:].double()
    return F.cross_entropy(logits, torch.tensor(window[-count:]), reduction="none")


def rolling_windows(ids: list[int], prefix: int, longest: int) -> list[tuple[list[int], int]]:
    """The windows of lm-evaluation-harness's rolling likelihood, with one token of context: each token is predicted
    once, and the last window reaches back as far as the model sees. -> (context and targets, number of targets)"""
    windows = [([prefix, *ids[:longest]], min(longest, len(ids)))]
    done = windows[0][1]
    while done < len(ids):
        end = min(done + longest, len(ids))
        windows.append((ids[end - longest - 1 : end], end - done))
        done = end
    return windows


@pytest.mark.parametrize("context", [32, 100, 200])
def test_disjoint_is_the_rolling_likelihood_of_lm_evaluation_harness(context):
    model = demo_model()
    ids = model.tokenizer.encode(TEXT)
    windows = rolling_windows(ids, model.tokenizer.bos_id, context)
    assert len(windows) > 1 and len(ids) % context != 0
    expected = sum(nll_of(model, window, count).sum().item() for window, count in windows)
    row = long_context.perplexity(model, TEXT, [context], "disjoint")["contexts"][0]
    assert row["targets"] == len(ids)
    assert row["nll"] * row["targets"] == pytest.approx(expected, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(expected / torch.log(torch.tensor(2.0)).item() / len(TEXT), rel=1e-6)


def test_fixed_and_sliding_by_one_with_the_full_context_are_the_loss_of_the_whole_text():
    model = demo_model()
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)]
    expected = nll_of(model, ids, 64).mean().item()
    for protocol in ("fixed", "sliding:1"):
        row = long_context.perplexity(model, TEXT, [len(ids) - 1], protocol, "last:64")["contexts"][0]
        assert row["nll"] == pytest.approx(expected, rel=1e-6)
        assert row["targets"] == 64


def test_buckets_add_up_to_the_perplexity_of_the_text():
    whole = demo_model().perplexity(TEXT)
    rows = long_context.perplexity(demo_model(), TEXT, [16, 64, 256], "buckets")["contexts"]
    assert [row["context"] for row in rows] == [16, 64, 256, whole.tokens]
    assert sum(row["targets"] for row in rows) == whole.tokens
    nats = sum(row["nll"] * row["targets"] for row in rows)
    assert nats / whole.tokens == pytest.approx(whole.nats_per_token, rel=1e-12)


def test_the_demo_model_gains_nothing_beyond_its_reach():
    result = long_context.perplexity(demo_model(), TEXT * 3, [64, 540, 571, 800], targets="last:32")
    rows = result["contexts"]
    assert (result["window"], result["reach"]) == (128, 508)
    assert rows[1]["nll"] == rows[2]["nll"] == rows[3]["nll"] != rows[0]["nll"]
    assert rows[3]["change"] == {"from": 571, "nll": 0, "standard_error": 0}


def test_a_longer_context_predicts_better_with_a_paired_error_below_the_plain_one():
    ids = demo_model().tokenizer.encode(TEXT)
    documents = [ids[begin : begin + 50] for begin in range(0, 450, 50)]
    one, many = long_context.perplexity(demo_model(), documents, [1, 32], targets="last:4")["contexts"]
    assert many["change"]["nll"] == pytest.approx(many["nll"] - one["nll"])
    assert many["change"]["nll"] + 2 * many["change"]["standard_error"] < 0
    assert many["change"]["standard_error"] < many["standard_error"] + one["standard_error"]


def test_documents_may_be_several_and_token_ids():
    ids = demo_model().tokenizer.encode(TEXT)
    documents = [ids[:150], ids[150:400], ids[400:450]]
    result = long_context.perplexity(demo_model(), documents, [100], targets="last:40")
    assert (result["documents"], result["skipped"], result["standard_error_over"]) == (2, 1, "documents")
    assert result["contexts"][0]["targets"] == 80 and result["contexts"][0]["bits_per_byte"] is None
    assert long_context.perplexity(tiny_model(), [[5, 6, 7, 8]], [2])["contexts"][0]["targets"] == 4


def test_passkey_cells_cover_the_grid_with_wilson_intervals():
    result = long_context.passkey(demo_model(), [128, 200], depths=3, trials=2, distances=4, style="ruler", digits=3)
    assert (result["style"], result["digits"]) == ("ruler", 3) and 100 < result["k_max"] < 128
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [
        (length, depth) for length in (128, 200) for depth in (0, 0.5, 1)
    ]
    assert len(result["distances"]) == 4 and result["chance"] == pytest.approx(1e-3)
    for cell in result["cells"] + result["distances"]:
        interval = binomtest(cell["correct"], cell["trials"]).proportion_ci(method="wilson")
        assert (cell["low"], cell["high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
        assert cell["logprob"] < 0
    assert result == long_context.passkey(demo_model(), [128, 200], 3, 2, "ruler", 3, 4)


def test_reach_of_the_demo_model_is_layers_times_window_less_one():
    result = long_context.reach(demo_model(), trials=1)
    assert (result["window"], result["layers"], result["reach"]) == (128, 4, 4 * 127)
    (farthest,) = set(result["farthest"].values())  # at the very edge a change may be lost in the rounding
    assert 490 < farthest <= 508
    shares = [result["changed"][str(d)] for d in range(len(result["changed"]))]
    assert sum(shares[:509]) / 509 >= 0.99 and shares[509:] and max(shares[509:]) == 0


def test_wrong_arguments_are_value_errors():
    model = demo_model()
    cases = [
        (lambda: long_context.perplexity(model, "short", [64]), "shorter than the context: "),
        (lambda: long_context.perplexity(model, TEXT, [64], "window"), "protocol must be fixed"),
        (lambda: long_context.perplexity(model, TEXT, [64], targets="64"), "targets must be all"),
        (lambda: long_context.perplexity(model, "", [64]), "no tokens"),
        (lambda: long_context.perplexity(model, TEXT, [5000]), "at most 4096"),
        (lambda: long_context.perplexity(tiny_model(), "text", [2]), "token ids"),
        (lambda: long_context.passkey(model, [5000]), "at most 4096"),
        (lambda: long_context.passkey(model, [128], style="needle"), "landmark or ruler"),
        (lambda: long_context.passkey(tiny_model(), [128]), "expected a tokenizer"),
        (lambda: long_context.reach(model, trials=0), "trials must be > 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


PERPLEXITY = {
    "protocol": "fixed",
    "contexts": [
        {"context": 64, "nll": 2.0, "bits_per_byte": 1.0, "standard_error": 0.1, "targets": 9},
        {"context": 512, "nll": 1.8, "bits_per_byte": 0.9, "standard_error": 0.1, "targets": 9},
    ],
    "window": 128,
    "reach": 508,
}
CELL = {"length": 128, "depth": 0.0, "distance": 60, "trials": 4, "correct": 3, "low": 0.3, "high": 0.95, "logprob": -1}
PASSKEY = {
    "style": "landmark",
    "digits": 5,
    "cells": [CELL, {**CELL, "depth": 1.0, "distance": 14, "correct": 4, "low": 0.5, "high": 1.0}],
    "distances": [],
    "k_max": 60,
    "chance": 1e-5,
    "window": 32,
    "reach": None,
}
REACH = {"window": 3, "layers": 2, "reach": 4, "changed": {"0": 1.0, "1": 1.0, "4": 0.5, "5": 0.0}, "farthest": {}}


@pytest.mark.parametrize(
    "kind, result, words",
    [
        ("perplexity", PERPLEXITY, ["bits per byte", "window W = 128", "reach L·(W−1) = 508", "protocol fixed"]),
        ("passkey", PASSKEY, ["chance", "k_max 60", "depth of the key"]),
        ("reach", REACH, ["receptive field: 4 tokens", "window W = 3", "reach L·(W−1) = 4"]),
    ],
)
def test_figures_are_svg_with_the_lines_of_the_window_and_the_same_bytes_again(kind, result, words, tmp_path):
    figures.draw(kind, result, tmp_path / "a.svg")
    command = [sys.executable, "-m", "mixtral.figures", kind, tmp_path / "b.svg"]
    subprocess.run(command, input=json.dumps(result).encode(), check=True, cwd=ROOT / "python")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = " ".join("".join(text.itertext()) for text in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text"))
    for word in words:
        assert word in texts


def test_distances_are_numbers_in_whatever_order(tmp_path):
    shares = {str(d): 1.0 if d <= 4 else 0.0 for d in range(12)}
    figures.draw("reach", {**REACH, "changed": shares}, tmp_path / "a.svg")
    figures.draw("reach", {**REACH, "changed": dict(sorted(shares.items()))}, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_figures_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="perplexity, passkey, reach, got loss"):
        figures.draw("loss", {}, tmp_path / "a.svg")


def test_the_figures_of_the_attention_page_are_what_the_operators_do(tmp_path):
    attention_figures.main(tmp_path)
    page = (ROOT / "docs" / "attention.md").read_text()
    for name in attention_figures.FIGURES:
        assert (tmp_path / f"{name}.svg").read_text() == (ROOT / "docs" / "figures" / f"{name}.svg").read_text(), name
        assert f"figures/{name}.svg" in page


def test_masks_of_the_figures_are_those_of_the_definitions():
    window, masks, rolling, chunks, reach = (panels() for panels in attention_figures.FIGURES.values())

    def seen(panel):
        return [[bool(fill) for fill in row] for row in panel.fills]

    assert seen(window[0]) == [[k <= q for k in range(10)] for q in range(10)]
    assert seen(window[1]) == [[0 <= q - k < 4 for k in range(10)] for q in range(10)]
    tokens = masks[0].rows
    assert seen(masks[0]) == [[q[0] == k[0] and k <= q for k in tokens] for q in tokens]
    assert seen(masks[1]) == [[q[0] == k[0] for k in tokens] for q in tokens]
    assert seen(masks[2]) == [[q[0] == k[:1] for k in masks[2].columns] for q in masks[2].rows]
    for token, (fills, texts) in enumerate(zip(rolling[0].fills, rolling[0].texts, strict=True)):
        visible = sorted(int(text) for fill, text in zip(fills, texts, strict=True) if fill == "a")
        assert visible == list(range(max(0, token - 3), token + 1))
    assert seen(chunks[0]) == seen(chunks[1]) == seen(chunks[2])
    for layers, panel in enumerate(reach, start=1):
        assert seen(panel) == [[0 <= q - k <= layers * 3 for k in range(14)] for q in range(14)]


def test_the_reach_of_a_random_model_from_python():
    model = mixtral.Mixtral.from_config(tiny_config(num_layers=3, window=5))
    result = long_context.reach(model, trials=2)
    assert result["reach"] == 12 and set(result["farthest"].values()) == {12}
