"""The balance loss in every convention and the z-loss: values, gradients, masks, and sums that add."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import mixtral.ops as ops
from comparing import assert_close, gradients
from mixtral import reference, train

E, K, L = 8, 2, 3
NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_logits(tokens: int, layers: int = L) -> list[Tensor]:
    return [(2 * torch.randn(tokens, E)).requires_grad_() for _ in range(layers)]


def choosing(first: Tensor, second: Tensor) -> Tensor:
    """Logits [T, E] that give two experts half of the probability each, or one all of it."""
    rows = torch.arange(len(first))
    logits = torch.zeros(len(first), E)
    logits[rows, second] = 60.0
    logits[rows, first] = 60.0
    return logits


@pytest.mark.parametrize(
    ("convention", "balanced", "collapsed"),
    [
        ("switch", 1.0 * L, 8.0 * L),
        ("t5x", 2.0, 8.0),
        ("hf", 2.0, 8.0),
        ("megablocks", 1.0, 4.0),
        ("mixtral", 1.0, 4.0),
    ],
)
def test_values_of_balanced_and_collapsed_routing(convention, balanced, collapsed):
    tokens = torch.arange(64)
    even = choosing(tokens % E, (tokens + (1 if convention != "switch" else 0)) % E)
    pair = choosing(0 * tokens + 3, 0 * tokens + (5 if convention != "switch" else 3))
    for logits, expected in ((even, balanced), (pair, collapsed)):
        assert train.load_balance_loss([logits] * L, K, convention).item() == pytest.approx(expected, rel=1e-6)


def test_pooling_layers_hides_layers_that_collapse_on_different_experts():
    zeros = torch.zeros(16).long()
    layers = [choosing(zeros + 2 * i, zeros + 2 * i + 1) for i in range(4)]
    assert train.load_balance_loss(layers, K, "hf").item() == pytest.approx(2.0)
    assert train.load_balance_loss(layers, K, "t5x").item() == pytest.approx(8.0)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
def test_hf_is_the_loss_of_transformers(masked):
    layers, mask = random_logits(4 * 25), torch.rand(4, 25) < 0.7
    expected = load_balancing_loss_func(tuple(layers), E, K, mask.long() if masked else None)
    actual = train.load_balance_loss(layers, K, "hf", mask.flatten() if masked else None)
    assert_close(actual, expected)
    assert_close(gradients(actual, layers), gradients(expected, layers), 4e-6)  # transformers errs too, being f32


def plain_balance(convention: str, layers: list[Tensor], groups: Tensor) -> Tensor:
    """As the papers' own code writes them, in f64."""
    per_layer = []
    for logits in layers:
        p = logits.double().softmax(-1)
        chosen = functional.one_hot(p.topk(K).indices, E).double()  # [T, K, E]
        if convention == "switch":  # Switch Transformers, eq. 4: alpha N sum f_i P_i
            per_layer.append(E * (functional.one_hot(p.argmax(-1), E).double().mean(0) * p.mean(0)).sum())
        elif convention == "megablocks":  # scale * dot(tokens_per_expert, expert_scores.mean(0))
            per_layer.append(E / (len(p) * K) * torch.dot(chosen.sum((0, 1)), p.mean(0)))
        else:  # flaxformer: E^2 times the mean over groups and experts of two means over the tokens of a group
            masks = chosen.amax(1)
            means = [(masks[groups == g].mean(0), p[groups == g].mean(0)) for g in groups.unique()]
            per_layer.append(E**2 * torch.stack([f * q for f, q in means]).mean())
    return sum(per_layer) if convention == "switch" else sum(per_layer) / len(per_layer)


@pytest.mark.parametrize("convention", ["switch", "t5x", "megablocks"])
def test_values_and_gradients_are_those_of_the_original(convention):
    layers, groups = random_logits(120), torch.randint(0, 4, (120,))
    expected = plain_balance(convention, layers, groups)
    actual = train.load_balance_loss(layers, K, convention, groups=groups if convention == "t5x" else None)
    assert_close(actual, expected)
    assert_close(gradients(actual, layers), gradients(expected, layers))


def test_groups_are_those_of_tokens_that_count():
    layers, groups = random_logits(100), torch.randint(0, 4, (100,))
    mask = (torch.rand(100) < 0.7) & (groups != 2)
    kept = [x[mask] for x in layers]
    expected = train.load_balance_loss(kept, K, "t5x", groups=groups[mask])
    assert_close(train.load_balance_loss(layers, K, "t5x", mask, groups), expected)


def test_gradients_are_the_closed_forms():
    """Balance: (E/n) p (f - sum f p); z: (2/n) lse p. To 1e-12 in f64 for the reference, to 1e-6 for the op in f32."""
    logits = (2 * torch.randn(90, E, dtype=torch.float64)).requires_grad_()
    ids = reference.topk_softmax(logits, K)[1]
    load, prob_sum, z_sum, count = reference.router_losses(logits, ids)
    p, lse, f = logits.softmax(-1), logits.logsumexp(-1, keepdim=True), load.double() / (count * K)
    balance = E / count.double() * p * (f - (f * p).sum(-1, keepdim=True))
    z = 2 / count.double() * lse * p
    assert_close(gradients(E * (f * prob_sum / count).sum(), [logits])[0], balance, 1e-12)
    assert_close(gradients(reference.router_losses(logits, ids)[2] / count, [logits])[0], z, 1e-12)
    zeros = torch.zeros((), dtype=torch.float64)
    assert_close(reference.router_losses_backward(E * f / count, zeros, logits), balance, 1e-12)
    assert_close(reference.router_losses_backward(0 * f, 1 / count.double(), logits), z, 1e-12)
    narrow = logits.detach().float().requires_grad_()
    assert_close(gradients(train.load_balance_loss([narrow], K, "mixtral"), [narrow])[0], balance)
    assert_close(gradients(train.z_loss([narrow]), [narrow])[0], z)


def test_z_loss_is_the_mean_over_tokens_and_layers():
    layers, mask = random_logits(50), torch.rand(50) < 0.6
    expected = torch.stack([x[mask].double().logsumexp(-1).square().mean() for x in layers]).mean()
    assert_close(train.z_loss(layers, mask), expected)


@pytest.mark.parametrize("loss", [*train.CONVENTIONS, "z"])
def test_padding_changes_no_bit(loss):
    layers = random_logits(60)
    mask = torch.zeros(200, dtype=torch.bool)
    mask[torch.randperm(200)[:60]] = True
    padded = [torch.full((200, E), NAN).index_put((mask,), x.detach()).requires_grad_() for x in layers]

    def value(layers: list[Tensor], mask: Tensor | None) -> Tensor:
        return train.z_loss(layers, mask) if loss == "z" else train.load_balance_loss(layers, K, loss, mask)

    expected, actual = value(layers, None), value(padded, mask)
    assert torch.equal(actual, expected)
    for a, b in zip(gradients(actual, padded), gradients(expected, layers), strict=True):
        assert torch.equal(a[mask], b) and (a[~mask] == 0).all()


@pytest.mark.parametrize("loss", [*train.CONVENTIONS, "z"])
def test_eight_microbatches_are_one_batch(loss):
    """From the sums; and as shares, which is how a step trains without keeping the graphs of all microbatches."""
    layers, mask = random_logits(512), torch.rand(512) < 0.8
    top_k = 1 if loss == "switch" else K

    def from_sums(prob_or_z: Tensor, load: Tensor, count: Tensor) -> Tensor:
        if loss == "z":
            return train.z_loss_from_sums(prob_or_z, count)
        return train.load_balance_loss_from_sums(load, prob_or_z, count, K, loss)

    whole = train.z_loss(layers, mask) if loss == "z" else train.load_balance_loss(layers, K, loss, mask)
    micro = [[x.detach()[i : i + 64].requires_grad_() for x in layers] for i in range(0, 512, 64)]
    sums = [train.router_sums(x, top_k, mask[64 * i : 64 * i + 64]) for i, x in enumerate(micro)]
    step = sums[0]
    for other in sums[1:]:
        step = step.plus(other)
    assert_close(from_sums(step.z_sum if loss == "z" else step.prob_sum, step.load, step.count), whole)
    shares = [from_sums(s.z_sum if loss == "z" else s.prob_sum, step.load, step.count) for s in sums]
    assert_close(sum(shares), whole)
    actual = [gradients(share, x) for share, x in zip(shares, micro, strict=True)]
    assert_close([torch.cat(parts) for parts in zip(*actual, strict=True)], gradients(whole, layers))


def test_choices_made_elsewhere_count():
    layers, bias = random_logits(64, 1), torch.rand(E)
    ids = ops.topk_softmax(layers[0].detach(), K, True, bias)[1]
    sums = train.router_sums(layers, K, topk_ids=[ids])
    assert torch.equal(sums.load[0], ids.flatten().long().bincount(minlength=E))
    assert not torch.equal(sums.load, train.router_sums(layers, K).load)


def test_nothing_but_padding_is_no_loss():
    layers, mask = random_logits(5), torch.zeros(5, dtype=torch.bool)
    for value in (
        *(train.load_balance_loss(layers, K, c, mask) for c in train.CONVENTIONS),
        train.z_loss(layers, mask),
    ):
        assert value.item() == 0
        assert all((x == 0).all() for x in gradients(value, layers))


def test_bad_arguments_of_balance_raise():
    layers = random_logits(5)
    known = "switch, t5x, hf, megablocks, mixtral"
    with pytest.raises(ValueError, match=f"unknown load-balancing convention 'gshard': use one of {known}"):
        train.load_balance_loss(layers, K, "gshard")
    with pytest.raises(ValueError, match="at least one layer"):
        train.load_balance_loss([], K)
    with pytest.raises(ValueError, match="groups are for the convention 't5x', not 'hf'"):
        train.load_balance_loss(layers, K, "hf", groups=torch.zeros(5))
    with pytest.raises(RuntimeError, match="router_losses: mask must be Bool"):
        train.z_loss(layers, torch.ones(5))
