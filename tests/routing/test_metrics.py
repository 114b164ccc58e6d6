"""Each metric against the plainest computation of the same, and small cases by hand."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from scipy import stats

from mixtral.routing.analysis import analyse
from mixtral.routing.caching import Caching, belady
from mixtral.routing.capacity import BATCH, capacity, expert_parallel
from mixtral.routing.confidence import confidence
from mixtral.routing.cross_layer import gate_recall
from mixtral.routing.locality import agreement, load_null, uniform_null
from mixtral.routing.saturation import saturation
from mixtral.routing.statistics import Units
from mixtral.routing.tokens import Tokens
from planted import blocks, draw_pairs, trace_of, words

EXPERTS = 8


def drawn(n: int, top_k: int = 2, seed: int = 0, load: np.ndarray | None = None) -> np.ndarray:
    """int [n, 1, K]: one layer."""
    return draw_pairs(np.random.default_rng(seed), n, np.ones(EXPERTS) if load is None else load, top_k)[:, None]


def tokens_of(experts: np.ndarray, num_domains: int = 1, **more) -> Tokens:
    return Tokens(trace_of(experts, blocks(len(experts), num_domains), **more))


# ---- locality


def test_baselines_of_the_paper() -> None:
    assert uniform_null(8, 2) == (pytest.approx(0.125), pytest.approx(0.464, abs=5e-4))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_null_is_the_agreement_of_all_pairs(top_k: int) -> None:
    experts = drawn(400, top_k, load=np.arange(1, 9))[:, 0]
    everyone = [agreement(experts, np.broadcast_to(row, experts.shape)) for row in experts]
    truth = np.mean(everyone, axis=(0, 2))
    assert load_null(experts, EXPERTS) == pytest.approx(truth, abs=1e-12 if top_k < 3 else 3e-3)


def test_pairs_end_with_their_document() -> None:
    trace = trace_of(drawn(300), blocks(300, 1))
    trace.special[150] = True  # its neighbours have none on that side
    first, second = Tokens(trace).pairs()
    assert len(first) == 300 - 3 - 2  # three documents; both pairs of the special token
    kept = np.delete(np.arange(300), 150)
    assert (kept[second] - kept[first] == 1).all() and not np.isin(kept[second] % 128, 0).any()


# ---- caches


def lru_rate(asked: np.ndarray, size: int) -> float:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in asked.tolist():
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > size:
            held.popitem(last=False)
    return hits / len(asked)


def best_rate(asked: tuple[int, ...], size: int) -> float:
    """Of all ways to replace, by trying them: the sets that the cache may hold, with their most hits."""
    held = {frozenset(): 0}
    for expert in asked:
        after: dict[frozenset, int] = {}
        for content, hits in held.items():
            choices = [content]
            if expert not in content:
                full = content | {expert}
                choices = [full] if len(full) <= size else [full - {out} for out in full]
            for choice in choices:
                after[choice] = max(after.get(choice, 0), hits + (expert in content))
        held = after
    return max(held.values()) / len(asked)


def test_lru_rates_are_those_of_a_simulation() -> None:
    experts = drawn(500, load=np.arange(1, 9))
    found = Caching(tokens_of(experts)).measure(0)
    asked = experts.reshape(-1)
    assert found["lru"] == pytest.approx([lru_rate(asked, size) for size in range(1, 9)])
    assert found["capacity"] == list(range(1, 9))


def test_belady_is_the_best_of_all() -> None:
    rng = np.random.default_rng(5)
    asked = rng.integers(5, size=(40, 3))  # three layers side by side
    found = belady(asked, 5)
    for layer in range(3):
        best = [best_rate(tuple(asked[:, layer].tolist()), size) for size in range(1, 6)]
        assert found[:, layer] == pytest.approx(best)


def test_no_cache_beats_belady_and_uniform_requests_hit_by_size() -> None:
    found = Caching(tokens_of(drawn(4000, top_k=1))).measure(0)
    half = stats.norm.ppf(0.995) * 0.5 / np.sqrt(4000)
    for name in ("lru", "lfu"):
        assert (np.array(found[name]) <= np.array(found["belady"]) + 1e-12).all()
        assert found[name] == pytest.approx(found["null"], abs=half + 8 / 4000)
    assert found["segment"]["value"] == pytest.approx(found["segment"]["null"], abs=0.03)


def test_lfu_keeps_the_experts_of_the_largest_load() -> None:
    experts = np.tile([0, 0, 0, 1, 1, 2, 0, 3], 200)[:, None, None]
    found = Caching(tokens_of(experts)).measure(0)
    assert found["lfu"][:4] == pytest.approx([4 / 8, 6 / 8, 7 / 8, 1], abs=0.01)


def test_a_run_of_one_pair_needs_two_experts() -> None:
    """Of any 16 tokens in another order more experts are asked for; the best c of a run serve the most."""
    found = Caching(tokens_of(np.repeat(drawn(40), 16, axis=0))).measure(0)["segment"]
    assert found["value"][:2] == [0.5, 1] and found["null"][1] < 0.7
    assert (np.diff(found["null"]) >= 0).all() and found["null"][-1] == 1


# ---- capacity and expert parallelism


def test_capacity_drops_what_a_loop_drops() -> None:
    experts = drawn(2 * BATCH + 100, load=np.arange(1, 9))
    found = capacity(tokens_of(experts), 0)
    limit, dropped, at = int(np.ceil(1.25 * BATCH * 2 / EXPERTS)), 0, []
    for batch in range(2):
        used = np.zeros(EXPERTS, int)
        for place, chosen in enumerate(experts[batch * BATCH : (batch + 1) * BATCH, 0]):
            for expert in chosen:
                used[expert] += 1
                if used[expert] > limit:
                    dropped += 1
                    at.append(place)
    assert found["1.25"]["dropped"] == pytest.approx(dropped / (2 * BATCH * 2))
    last = sum(place >= BATCH - 51 for place in at)
    assert found["1.25"]["by_position"][-1] == pytest.approx(last / (2 * 51 * 2))
    assert found["1.25"]["by_position"][0] == 0 < found["1.25"]["by_position"][-1]


def test_capacity_of_a_uniform_router_is_binomial() -> None:
    batches = 60
    found = capacity(tokens_of(drawn(batches * BATCH, top_k=1)), 0)["1.0"]["dropped"]
    limit = BATCH // EXPERTS
    over = stats.binom(BATCH, 1 / EXPERTS)
    truth = over.expect(lambda n: np.maximum(n - limit, 0)) * EXPERTS / BATCH
    spread = np.sqrt(over.expect(lambda n: np.maximum(n - limit, 0) ** 2) * EXPERTS / batches) / BATCH
    assert abs(found - truth) < stats.norm.ppf(0.995) * spread


def test_ranks_hold_runs_of_experts() -> None:
    two = np.tile([4, 5], BATCH // 2)[:, None, None]  # neighbours are on the same rank
    found = expert_parallel(tokens_of(two), 0)
    assert {ranks: item["max_over_mean"] for ranks, item in found.items()} == {"2": 2, "4": 4, "8": 4}
    one = np.full((BATCH, 1, 1), 3)
    found = expert_parallel(tokens_of(one), 0)
    assert {ranks: item["max_over_mean"] for ranks, item in found.items()} == {"2": 2, "4": 4, "8": 8}
    assert found["2"]["null"] == 2


def test_neighbours_that_are_alike_load_a_rank_more() -> None:
    experts = np.repeat(drawn(40, top_k=1), BATCH // 4, axis=0)
    for item in expert_parallel(tokens_of(experts), 0).values():
        assert item["max_over_mean"] > item["null"]


def test_less_than_a_batch_is_not_measured() -> None:
    tokens = tokens_of(drawn(BATCH - 1))
    assert capacity(tokens, 0) is None and expert_parallel(tokens, 0) is None


# ---- confidence


def test_confidence_is_that_of_the_softmax() -> None:
    logits = torch.randn(200, 1, EXPERTS, generator=torch.Generator().manual_seed(0)).half()
    logits[0, 0] = 0
    logits[0, 0, :2] = 1  # undecided between third and second in any precision but for the ties below
    ids = logits.float().topk(2, dim=-1).indices.numpy()
    found = confidence(tokens_of(ids, router_logits=logits), 0)["domain0"]
    share = logits[:, 0].float().softmax(-1).numpy()
    assert found["entropy"] == pytest.approx(float(stats.entropy(share, axis=1).mean() / np.log(EXPERTS)), abs=1e-6)
    assert found["top1"] == pytest.approx(float(share.max(1).mean()), abs=1e-6)
    best = logits[:, 0].float().sort(dim=-1, descending=True).values
    assert found["margin"] == pytest.approx((best[:, 1] - best[:, 2]).mean().item(), abs=1e-5)
    assert found["margin_median"] == pytest.approx(float(np.median(best[:, 1] - best[:, 2])), abs=1e-5)


def test_where_a_bias_decides_the_margin_is_negative() -> None:
    logits = torch.zeros(50, 1, EXPERTS)
    logits[..., 2] = 0.5
    ids = np.tile(np.array([0, 1]), (50, 1, 1))  # not the third expert
    found = confidence(tokens_of(ids, router_logits=logits.half()), 0)["domain0"]
    assert (found["margin"], found["within_bfloat16"]) == (-0.5, 0.0)


@pytest.mark.parametrize(("gap", "undecided"), [(0.0, 1.0), (0.007, 1.0), (0.009, 0.0), (0.5, 0.0)])
def test_choices_that_bfloat16_could_change(gap: float, undecided: float) -> None:
    """Near 1 a number of bfloat16 is 1/128 from the next, so rounding moves two logits by 1/128 together."""
    logits = torch.zeros(50, 1, EXPERTS)
    logits[..., 0], logits[..., 1], logits[..., 2] = 3, 1 + gap, 1
    found = confidence(tokens_of(np.tile(np.array([0, 1]), (50, 1, 1)), router_logits=logits.half()), 0)["domain0"]
    assert found["within_bfloat16"] == undecided


def test_without_logits_there_is_no_confidence() -> None:
    assert "confidence" not in analyse(trace_of(drawn(200), blocks(200, 1)))["layers"][0]


# ---- the next router, one layer early


def test_gate_recall_is_the_share_of_the_next_layers_experts() -> None:
    """Layer 1's router finds both of its experts in layer 0's input; layer 2's, one of two and chance for the other."""
    experts = np.stack([drawn(3000, seed=seed)[:, 0] for seed in range(3)], 1)  # [N, 3, 2]
    early = experts[:, 1:].copy()
    early[:, 1, 1] = (early[:, 1, 0] + 1) % EXPERTS
    trace = trace_of(experts, blocks(3000, 1), next_gate_ids=torch.from_numpy(early.astype(np.uint8)))
    found = [gate_recall(Tokens(trace), layer) for layer in range(3)]
    assert found[0]["value"] == found[0]["low"] == 1 and found[2] is None
    shared = (experts[:, 2, 1] == early[:, 1, 1]).mean()
    assert found[1]["value"] == pytest.approx(0.5 + shared / 2)
    assert found[1]["low"] < found[1]["value"] < found[1]["high"]
    assert found[0]["null"] == pytest.approx(1 / 4, abs=0.01)


def test_gate_recall_is_against_the_models_next_layer() -> None:
    experts = np.stack([drawn(300, seed=seed)[:, 0] for seed in range(3)], 1)
    trace = trace_of(experts, blocks(300, 1), next_gate_ids=torch.from_numpy(experts[:, 1:].astype(np.uint8)))
    layers = analyse(trace, layers=[0, 2])["layers"]
    assert layers[0]["gate_recall"]["value"] == 1 and "gate_recall" not in layers[1]
    assert "gate_recall" not in analyse(trace_of(experts, blocks(300, 1)))["layers"][0]


# ---- saturation


def test_saturation_of_itself_and_of_another_router() -> None:
    trace, other = (trace_of(drawn(3000, seed=seed), blocks(3000, 1)) for seed in (0, 1))
    same = saturation(Tokens(trace), trace, 0)
    assert same["value"] == same["low"] == same["high"] == 1
    chance = saturation(Tokens(trace), other, 0)
    assert chance["low"] <= 1 / 4 <= chance["high"]
    assert chance["null"] == pytest.approx(1 / 4, abs=0.01) and chance["uniform"] == 1 / 4


def test_saturation_of_half_the_experts() -> None:
    trace, other = (trace_of(drawn(3000), blocks(3000, 1)) for _ in range(2))
    other.topk_ids[:, 0, 1] = (other.topk_ids[:, 0, 0] + 1) % EXPERTS
    shared = (trace.topk_ids[:, 0, 1] == other.topk_ids[:, 0, 1]).double().mean().item()
    assert saturation(Tokens(trace), other, 0)["value"] == pytest.approx(0.5 + shared / 2)


@pytest.mark.parametrize("what", ["text", "model"])
def test_reference_must_be_of_the_same_text_and_shape(what: str) -> None:
    trace = trace_of(drawn(200), blocks(200, 1))
    other = trace_of(drawn(200, top_k=2 if what == "text" else 3), blocks(200, 1), words(200, seed=1))
    with pytest.raises(ValueError, match=f"a trace of another {what}"):
        analyse(trace, reference=other)


# ---- units, layers, domains


@pytest.mark.parametrize(("docs", "units"), [(5, 20), (30, 30), (1000, 200)])
def test_units_are_documents_or_runs(docs: int, units: int) -> None:
    doc = np.repeat(np.arange(docs), 40)
    found = Units(doc, np.zeros(len(doc), int), 1)
    assert len(found.domain) == units == found.of_token.max() + 1
    assert (np.diff(found.of_token) >= 0).all()
    if docs >= 20:
        assert all(len(np.unique(found.of_token[doc == d])) == 1 for d in range(docs))


def test_special_tokens_are_left_out() -> None:
    trace = trace_of(drawn(400), blocks(400, 1))
    trace.special[::2] = True
    trace.topk_ids[::2] = 0
    first = np.bincount(trace.topk_ids[1::2, 0, 0], minlength=8) / 200
    assert analyse(trace)["layers"][0]["load"]["domain0"]["first"] == pytest.approx(first)


def test_layers_are_chosen_by_number() -> None:
    experts = np.concatenate([drawn(300), np.full((300, 1, 2), [3, 4])], 1)
    (layer,) = analyse(trace_of(experts, blocks(300, 1)), layers=[1])["layers"]
    assert layer["layer"] == 1 and layer["load"]["domain0"]["first"][3] == 1
    with pytest.raises(ValueError, match=r"--layers: expected layers in \[0, 1\], got 2"):
        analyse(trace_of(experts, blocks(300, 1)), layers=[2])


def test_a_domain_needs_twenty_tokens() -> None:
    with pytest.raises(ValueError, match="domain domain1: expected at least 20 tokens, got 10"):
        analyse(trace_of(drawn(100), (np.arange(100) >= 90).astype(int)))


def test_one_expert_per_token_has_no_second() -> None:
    layer = analyse(trace_of(drawn(600, top_k=1), blocks(600, 1)))["layers"][0]
    assert layer["load"]["domain0"]["second"] is None
    assert layer["locality"]["domain0"]["first"] == layer["locality"]["domain0"]["either"]


def test_all_experts_can_be_chosen() -> None:
    """K = E: nothing is left to tell, and nothing divides by zero."""
    metrics = analyse(trace_of(drawn(200, top_k=8), blocks(200, 1), router_logits=torch.zeros(200, 1, 8).half()))
    layer = metrics["layers"][0]
    assert layer["locality"]["domain0"]["either"] == 1
    assert layer["information"]["token"]["value"] == pytest.approx(0)
    assert layer["confidence"]["domain0"]["margin"] is None


def test_what_is_not_known_is_null() -> None:
    """No prediction, and documents of one token: no neighbours."""
    trace = trace_of(drawn(200), blocks(200, 1))
    trace.predicted_ids[:] = -1
    trace.docs[:] = torch.arange(200)
    layer = analyse(trace)["layers"][0]
    assert layer["information"]["predicted"]["value"] is None
    assert layer["information"]["previous_given_token"]["value"] is None
    assert layer["vocabulary"]["predicted"]["specialisation"] is None
    assert layer["vocabulary"]["true"]["specialisation"] is None
    assert layer["locality"]["domain0"]["first"] is None
    assert layer["load"]["domain0"]["first"] is not None
