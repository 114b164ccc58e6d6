"""Routers that were planted: every metric has a closed form, which must lie in its 99 % interval."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from mixtral.routing.analysis import analyse
from mixtral.routing.coactivation import coactivation
from mixtral.routing.expert_load import expert_load
from mixtral.routing.statistics import entropy_bits
from mixtral.routing.tokens import Tokens
from planted import blocks, draw_pairs, markov, trace_of, words

N, EXPERTS, Q = 40_000, 8, 0.5
UNIFORM, BY_TOKEN, BY_DOMAIN, COPY = range(4)  # layers
UNIFORM_EITHER = 1 - 15 / 28  # two pairs of eight share none: C(6,2) / C(8,2)
PERCENT_99 = stats.norm.ppf(0.995)


def pairs(first: np.ndarray) -> np.ndarray:
    """Experts (2i, 2i + 1) of i, [n, 2]."""
    return np.stack([2 * first, 2 * first + 1], 1)


@pytest.fixture(scope="module")
def token_pair() -> np.ndarray:
    """The pair that the token router gives each token."""
    return np.random.default_rng(7).integers(4, size=400)


@pytest.fixture(scope="module")
def metrics(token_pair: np.ndarray) -> dict:
    rng, tokens, domain = np.random.default_rng(4), words(N), blocks(N, 3)
    position = trace_of(np.zeros((N, 1, 2)), domain).positions.numpy()
    copied = markov(rng, position, EXPERTS // 2, Q)
    layers = [draw_pairs(rng, N, np.ones(EXPERTS)), pairs(token_pair[tokens]), pairs(domain), pairs(copied)]
    return analyse(trace_of(np.stack(layers, 1), domain, tokens))


def assert_inside(found: dict, truth: float) -> None:
    assert found["low"] - 1e-6 <= truth <= found["high"] + 1e-6, f"{truth} is not in {found}"
    assert found["low"] <= found["value"] <= found["high"]


def assert_load(layer: dict, name: str, truth: np.ndarray) -> None:
    for load in layer["load"].values():
        assert (np.abs(load[name] - truth) <= np.maximum(load["half_width"][name], 1e-12)).all()


def test_uniform_load(metrics: dict) -> None:
    layer = metrics["layers"][UNIFORM]
    assert_load(layer, "first", np.full(EXPERTS, 1 / 8))
    assert_load(layer, "either", np.full(EXPERTS, 1 / 8))
    for load in layer["load"].values():
        assert load["entropy"] == pytest.approx(1, abs=1e-3) and load["jain"] == pytest.approx(1, abs=2e-3)
        assert load["dead"] == 0 and load["effective_experts"] == pytest.approx(8, rel=2e-3)


def test_load_of_planted_domains(metrics: dict) -> None:
    for domain, load in enumerate(metrics["layers"][BY_DOMAIN]["load"].values()):
        assert load["first"] == [float(expert == 2 * domain) for expert in range(EXPERTS)]
        assert load["second"] == [float(expert == 2 * domain + 1) for expert in range(EXPERTS)]
        assert load["entropy"] == pytest.approx(1 / 3) and load["jain"] == pytest.approx(1 / 4)
        assert load["max_violation"] == pytest.approx(3) and load["dead"] == 6
        assert load["effective_experts"] == pytest.approx(2) and load["gini"] == pytest.approx(0.75)


def test_uniform_locality(metrics: dict) -> None:
    for found in metrics["layers"][UNIFORM]["locality"].values():
        assert_inside(found["intervals"]["first"], 1 / 8)
        assert_inside(found["intervals"]["either"], UNIFORM_EITHER)
        assert found["uniform_first"] == 1 / 8 and found["uniform_either"] == pytest.approx(UNIFORM_EITHER)
        assert found["null_first"] == pytest.approx(1 / 8, rel=0.01)
        assert found["null_either"] == pytest.approx(UNIFORM_EITHER, rel=0.01)


def test_copied_experts_repeat(metrics: dict) -> None:
    for found in metrics["layers"][COPY]["locality"].values():
        assert_inside(found["intervals"]["first"], Q + (1 - Q) / 4)
        assert_inside(found["intervals"]["either"], Q + (1 - Q) / 4)
        assert found["null_first"] == pytest.approx(1 / 4, rel=0.01)
        assert found["null_either"] == pytest.approx(1 / 4, rel=0.01)
        assert found["lags"]["2"]["first"] == pytest.approx(Q**2 + (1 - Q**2) / 4, abs=0.02)
        assert found["lags"]["64"]["first"] == pytest.approx(1 / 4, abs=0.02)


def test_token_router_repeats_as_often_as_its_load_says(metrics: dict) -> None:
    """The paper's baseline, 12.5 %, would call this locality; the load-corrected one does not."""
    for found in metrics["layers"][BY_TOKEN]["locality"].values():
        assert_inside(found["intervals"]["first"], found["null_first"])
        assert found["intervals"]["first"]["low"] > 1 / 8
        assert found["different_token"]["first"] < found["first"]


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        *((UNIFORM, cause) for cause in ("token", "domain", "domain_given_token", "previous_given_token", "position")),
        *((BY_TOKEN, cause) for cause in ("domain", "domain_given_token", "previous_given_token")),
        *((BY_DOMAIN, cause) for cause in ("token", "predicted")),
        *((COPY, cause) for cause in ("token", "domain", "domain_given_token", "predicted")),
    ],
)
def test_what_decides_nothing_tells_no_bit(metrics: dict, layer: int, cause: str) -> None:
    found = metrics["layers"][layer]["information"][cause]
    assert_inside(found, 0)
    assert abs(found["value"]) < 0.01


def test_token_router_is_decided_by_the_token(metrics: dict, token_pair: np.ndarray) -> None:
    truth = entropy_bits(np.bincount(token_pair[words(N)]))  # of the pair; which of the two tells nothing
    assert_inside(metrics["layers"][BY_TOKEN]["information"]["token"], truth)


def test_domain_router_is_decided_by_the_domain(metrics: dict) -> None:
    found = metrics["layers"][BY_DOMAIN]["information"]
    for cause in ("domain", "domain_given_token", "domain_first"):
        assert found[cause]["value"] == pytest.approx(np.log2(3), abs=0.01)


def test_copy_router_is_decided_by_the_previous_expert(metrics: dict) -> None:
    same, other = Q + (1 - Q) / 4, (1 - Q) / 4
    truth = 2 + same * np.log2(same) + 3 * other * np.log2(other)
    assert_inside(metrics["layers"][COPY]["information"]["previous_given_token"], truth)


def test_plug_in_information_would_be_wrong(metrics: dict) -> None:
    """The bias that is taken off is larger than the interval, so leaving it in would be seen."""
    found = metrics["layers"][UNIFORM]["information"]["token"]
    assert found["value"] + found["null"] > found["high"]


def test_vocabulary_of_planted_routers(metrics: dict) -> None:
    uniform, token = (metrics["layers"][layer]["vocabulary"] for layer in (UNIFORM, BY_TOKEN))
    assert token["input"] == {"specialisation": 1, "null": pytest.approx(token["input"]["null"]), "shrunk": 1}
    assert token["overlap"]["same_token"] == 1
    assert uniform["input"]["specialisation"] > 0.26  # rare tokens: the largest of noisy shares
    for label in ("input", "predicted", "true"):
        assert abs(uniform[label]["shrunk"]) < 0.01
    assert uniform["overlap"]["same_token"] == pytest.approx(1 / 4, abs=0.003)
    assert uniform["overlap"]["null"] == pytest.approx(1 / 4, abs=0.001)


def test_top_tokens_are_those_of_the_expert(metrics: dict, token_pair: np.ndarray) -> None:
    for expert, top in enumerate(metrics["layers"][BY_TOKEN]["vocabulary"]["top_tokens"]):
        assert len(top) == 8
        assert all(token_pair[found["token_id"]] == expert // 2 and found["share"] == 1 for found in top)


def test_coactivation_of_planted_routers(metrics: dict) -> None:
    uniform, token = (metrics["layers"][layer]["coactivation"] for layer in (UNIFORM, BY_TOKEN))
    others = ~np.eye(EXPERTS, dtype=bool)
    of_expert = N / 4
    half = PERCENT_99 * np.sqrt(1 / 7 * 6 / 7 / of_expert)
    assert np.abs(np.array(uniform["share"])[others] - 1 / 7).max() < 1.5 * half  # 56 of them
    assert np.array(uniform["lift"], float)[others] == pytest.approx(1, abs=0.1)
    partner = np.arange(EXPERTS) ^ 1
    assert np.array(token["share"])[np.arange(EXPERTS), partner] == pytest.approx(1)


def test_uneven_loads_alone_give_no_lift() -> None:
    load = np.array([8, 4, 2, 2, 1, 1, 1, 1.0])
    sets = np.array(list(combinations(range(EXPERTS), 2)))
    share = load[sets].prod(1) / load[sets].prod(1).sum()
    drawn = sets[np.random.default_rng(0).choice(len(sets), N, p=share)]
    lift = np.array(coactivation(Tokens(trace_of(drawn[:, None], blocks(N, 1))), 0)["lift"])
    assert (np.abs(lift[sets[:, 0], sets[:, 1]] - 1) <= 3.5 / np.sqrt(N * share)).all()
    assert share.max() / share.min() == 32


def test_transitions_of_planted_routers(metrics: dict) -> None:
    uniform, token = (metrics["layers"][layer]["transition"] for layer in (UNIFORM, BY_TOKEN))
    assert np.array(uniform["share"])[:, ::2].sum(1) == pytest.approx(1)  # the next layer uses even experts first
    assert abs(uniform["information"]) < 3e-4 and abs(uniform["normalised"]) < 3e-4
    assert abs(token["information"]) < 3e-3  # the domain's expert does not depend on the token's
    assert "transition" not in metrics["layers"][-1]


def test_paths_of_independent_layers_are_as_frequent_as_their_product(metrics: dict) -> None:
    for path in metrics["paths"][:3]:
        assert path["share"] == pytest.approx(path["null"], rel=0.3)


def test_two_planted_languages() -> None:
    english, french = np.array([4, 2, 2, 1, 1, 1, 1, 1.0]), np.array([1, 1, 1, 1, 1, 2, 2, 4.0])
    rng, domain = np.random.default_rng(3), blocks(N, 2)
    experts = np.where(domain[:, None] == 0, draw_pairs(rng, N, english, 1), draw_pairs(rng, N, french, 1))
    trace = trace_of(np.stack([experts, draw_pairs(rng, N, np.ones(8), 1)], 1), domain, domain_names=["en", "fr"])
    different, same = (layer["languages"] for layer in analyse(trace, languages=["en", "fr"])["layers"])
    p, q = english / english.sum(), french / french.sum()
    each = (entropy_bits(p) + entropy_bits(q)) / 2
    truth = (entropy_bits((p + q) / 2) - each) / (3 - each)
    assert_inside(different["divergence"]["en-fr"], truth)
    assert different["divergence"]["en-fr"]["low"] > 3 * different["divergence"]["en-fr"]["null"]
    assert same["divergence"]["en-fr"]["value"] < 1
    assert different["experts"]["en"] == pytest.approx(p, abs=0.01)


def test_intervals_hold_the_truth_99_times_of_100() -> None:
    """Few: they would be too narrow. None: too wide."""
    outside = []
    for seed in range(40):
        experts = draw_pairs(np.random.default_rng(seed), 12_000, np.ones(EXPERTS))
        for load in expert_load(Tokens(trace_of(experts[:, None], blocks(12_000, 3))), 0).values():
            for name in ("first", "either"):
                outside += list(np.abs(np.array(load[name]) - 1 / 8) > load["half_width"][name])
    assert 0.003 < np.mean(outside) < 0.02  # of 1920
