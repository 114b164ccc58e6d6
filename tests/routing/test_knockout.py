"""The model without one of its experts."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from binary import DEMO
from mixtral import Mixtral, Trace
from mixtral.routing.knockout import knockout

TEXT = "And it came to"


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return Mixtral.from_pretrained(DEMO, dtype="float32", pack=False)


@pytest.fixture(scope="module")
def trace(model: Mixtral) -> Trace:
    return model.trace(TEXT)


@pytest.fixture(scope="module")
def found(model: Mixtral, trace: Trace) -> dict:
    return knockout(model, trace, len(trace), [0, 3])


def test_the_weights_are_as_before(model: Mixtral, trace: Trace, found: dict) -> None:
    assert torch.equal(model.trace(TEXT).topk_ids, trace.topk_ids)
    assert torch.equal(
        model(trace.token_ids[None].long()),
        Mixtral.from_pretrained(DEMO, dtype="float32")(trace.token_ids[None].long()),
    )


@pytest.mark.parametrize("layer", [0, 3])
def test_experts_that_no_token_used_are_not_missed(trace: Trace, found: dict, layer: int) -> None:
    # What the last token's experts add changes no score: nothing comes after it.
    used = set(trace.topk_ids[:-1, layer].flatten().tolist())
    assert 0 < len(used) < 8
    for expert, delta in enumerate(found["layers"][layer]["delta"]):
        assert (delta != 0) == (expert in used)


def test_the_rise_is_that_of_a_model_with_a_zero_expert(trace: Trace, found: dict) -> None:
    expert = int(trace.topk_ids[1, 0, 0])
    changed = Mixtral.from_pretrained(DEMO, dtype="float32", pack=False)
    ids, nll = trace.token_ids.long(), []
    for _ in range(2):
        nll.append(cross_entropy(changed(ids[None])[0, :-1], ids[1:]).item())
        changed.named_parameters()["layers.0.moe.down_proj"][expert] = 0
    assert found["layers"][0]["delta"][expert] == pytest.approx(nll[1] - nll[0], abs=1e-5)


def test_as_many_experts_as_trained_give_the_score_of_the_text(model: Mixtral, found: dict) -> None:
    assert found["experts_per_token"]["k"] == list(range(1, 9))
    assert found["experts_per_token"]["nll"][1] == pytest.approx(model.perplexity(TEXT).nats_per_token, abs=1e-5)


def test_similarity_of_an_expert_with_the_mean(model: Mixtral, found: dict) -> None:
    parameters = model.named_parameters()
    flat = torch.cat([parameters[f"layers.3.moe.{name}"].flatten(1) for name in ("gate_up_proj", "down_proj")], 1)
    truth = [float(row @ flat.mean(0) / (row.norm() * flat.mean(0).norm())) for row in flat]
    assert found["layers"][3]["similarity"] == pytest.approx(truth, abs=1e-5)
