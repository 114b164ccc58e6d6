"""Router options, statistics and errors of the model for training."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from training_models import CROSS_ENTROPY_ALONE, DENSE, SWITCH, livelier, random_batch, small_config

from mixtral.train import Batch, Mixtral, RouterOptions, z_loss


def test_renormalised_top_1_is_refused_and_switch_reaches_the_router() -> None:
    batch = random_batch(small_config())
    model = Mixtral.from_config(small_config(top_k=1))
    with pytest.raises(ValueError, match="weight is always 1.*norm_topk_prob"):
        model.loss(batch)
    with torch.no_grad():  # it still computes
        model(batch.input_ids[None])
    model.requires_grad_(True).get_submodule("model.layers.0.mlp.gate").requires_grad_(False)
    model.get_submodule("model.layers.1.mlp.gate").requires_grad_(False)
    model.loss(batch).total.backward()  # and trains with routers that stay as they are

    switch = Mixtral.from_config(small_config(**SWITCH), router=CROSS_ENTROPY_ALONE)
    switch.loss(batch).total.backward()
    assert all(layer.mlp.gate.weight.grad.norm() > 1e-6 for layer in switch.model.layers)


def test_statistics_are_those_of_the_router_logits() -> None:
    model = livelier(Mixtral.from_config(small_config()))
    logits = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: logits.append(out[0].detach()))
    batch = random_batch(model.config)
    losses = model.loss(batch)
    assert losses.load.shape == (2, 4) and losses.tokens == batch.tokens
    balance = 0.0
    for n, x in enumerate(logits):
        counts = functional.one_hot(x.topk(2).indices, 4).sum((0, 1))
        assert torch.equal(losses.load[n], counts)
        assert losses.max_logit[n] == x.abs().max()
        balance += 4 * (counts / counts.sum() * x.softmax(-1).mean(0)).sum().item() / len(logits)
    assert losses.balance.item() == pytest.approx(balance, rel=1e-6)
    torch.testing.assert_close(losses.z, z_loss(logits))
    total = losses.cross_entropy + 1e-2 * losses.balance + 1e-3 * losses.z
    torch.testing.assert_close(losses.total.detach(), total)
    dense = Mixtral.from_config(small_config(**DENSE)).loss(batch)
    assert dense.total == dense.cross_entropy and dense.load.numel() == 0


def test_weights_of_labels() -> None:
    model = livelier(Mixtral.from_config(small_config(), router=CROSS_ENTROPY_ALONE))
    batch = random_batch(model.config)
    weights = torch.rand(batch.tokens)
    batch = Batch(batch.input_ids, batch.labels.clone(), batch.positions, batch.cu_seqlens, weights)
    batch.labels[3:20] = -100
    with torch.no_grad():
        losses = model.loss(batch)
        parts = [model(batch.input_ids[None, a:b])[0] for a, b in batch.cu_seqlens.unfold(0, 2, 1).tolist()]
    each = functional.cross_entropy(torch.cat(parts), batch.labels, reduction="none")
    used = batch.labels != -100
    torch.testing.assert_close(losses.targets, weights[used].sum())
    torch.testing.assert_close(losses.total, (weights * each)[used].sum() / weights[used].sum())


def test_a_head_that_peft_has_wrapped_counts() -> None:
    model = livelier(Mixtral.from_config(small_config()))
    batch = random_batch(model.config)
    batch.labels[2:7] = -100
    expected = model.loss(batch).total
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    logits = tuned.base_model.model(batch.input_ids[None, :9])[0, :2]
    losses = tuned(batch)
    assert abs(losses.total - expected) > 0.01
    one = Batch(batch.input_ids[:2], batch.labels[:2], batch.positions[:2], torch.tensor([0, 2], dtype=torch.int32))
    expected = functional.cross_entropy(logits, one.labels)
    torch.testing.assert_close(tuned(one).cross_entropy, expected)


def test_no_targets() -> None:
    model = livelier(Mixtral.from_config(small_config(), router=CROSS_ENTROPY_ALONE))
    batch = random_batch(model.config)
    batch.labels[:] = -100
    losses = model.loss(batch)
    losses.total.backward()
    assert losses.total == 0 and not any(weight.grad.any() for weight in model.parameters())


def test_loss_free_balancing_evens_the_load() -> None:
    options = RouterOptions(balance="loss_free", bias_update_rate=0.01)
    model = livelier(Mixtral.from_config(small_config(), router=options))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[0] *= 3
    batch = random_batch(model.config, (60, 60, 60))

    def most() -> torch.Tensor:  # [L], the largest load as a share of the mean
        load = model.loss(batch).load.float()
        return load.amax(1) / load.mean(1)

    before = most()
    for _ in range(150):
        model.update_balance(model.loss(batch).load)
    assert (before > 1.4).any() and (most() < 1.15).all()
    bias = model.state_dict()["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0.02
    losses = model.loss(batch)
    losses.total.backward()
    torch.testing.assert_close(losses.total, losses.cross_entropy + 1e-3 * losses.z)  # no balance loss
    load = torch.tensor([[5, 1, 3, 3], [3, 3, 3, 3]])
    old = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers]
    model.update_balance(load)
    steps = [layer.mlp.gate.e_score_correction_bias - x for layer, x in zip(model.model.layers, old, strict=True)]
    torch.testing.assert_close(steps[0], torch.tensor([-0.01, 0.01, 0, 0]), atol=1e-6, rtol=0)
    assert not steps[1].any()


def test_jitter_and_expert_dropout_act_in_training_alone() -> None:
    model = livelier(Mixtral.from_config(small_config()))
    batch = random_batch(model.config)
    plain = model.loss(batch).total
    for options in (RouterOptions(jitter=0.1), RouterOptions(expert_dropout=0.3)):
        noisy = Mixtral(model.config, options)
        noisy.load_state_dict(model.state_dict())
        torch.manual_seed(1)
        first, second = noisy.loss(batch).total, noisy.loss(batch).total
        torch.manual_seed(1)
        noisy.gradient_checkpointing = True
        again = noisy.loss(batch).total
        assert first == again and len({first.item(), second.item(), plain.item()}) == 3
        first.backward()
        once = [weight.grad.clone() for weight in noisy.parameters()]
        noisy.zero_grad()
        again.backward()  # the layers are computed again with the same random numbers
        assert all(torch.equal(a, weight.grad) for a, weight in zip(once, noisy.parameters(), strict=True))
        assert noisy.eval().loss(batch).total == plain


def test_expert_dropout_keeps_the_mean() -> None:
    config = small_config(num_layers=1)
    experts = (
        livelier(Mixtral.from_config(config, router=RouterOptions(expert_dropout=0.4))).model.layers[0].mlp.experts
    )
    x, weights = torch.randn(1, 40).expand(4000, -1), torch.full((4000, 2), 0.5)
    ids = torch.tensor([1, 3], dtype=torch.int32).expand(4000, -1).contiguous()
    with torch.no_grad():
        dropped = experts.train()(x.contiguous(), weights, ids)
        plain = experts.eval()(x[:1].contiguous(), weights[:1], ids[:1])
    error = (dropped.mean(0) - plain[0]).abs() / (dropped.std(0) / 4000**0.5)
    assert error.max() < 5 and dropped.std(0).min() > 0


def test_initial_weights() -> None:
    config = small_config(hidden_size=400, num_experts=64)
    model = Mixtral.from_config(config, seed=5, router=RouterOptions(init_scale=0.1))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
            continue
        deviation = (0.1 / 400) ** 0.5 if name.endswith("gate.weight") else 0.02
        assert weight.abs().max() <= 3 * deviation
        assert weight.std().item() == pytest.approx(0.9866 * deviation, rel=0.05), name  # of the cut distribution
    same = Mixtral.from_config(config, seed=5, router=RouterOptions(init_scale=0.1))
    other = Mixtral.from_config(config, seed=6)
    assert torch.equal(same.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    half = Mixtral.from_config(config, dtype="bfloat16", seed=5, router=RouterOptions(init_scale=0.1))
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    assert half.model.layers[0].mlp.gate.weight.dtype == torch.float32
    rounded = copy.copy(config)
    rounded.router_in_f32 = False
    assert Mixtral.from_config(rounded, torch.float16).model.layers[0].mlp.gate.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance": "auxiliary"}, "balance must be one of switch, global, loss_free, none, got 'auxiliary'"),
        ({"balance_coefficient": -1.0}, "balance_coefficient must be at least 0"),
        ({"z_coefficient": float("nan")}, "z_coefficient must be at least 0"),
        ({"jitter": 1.0}, r"jitter must be in \[0, 1\)"),
        ({"expert_dropout": -0.1}, r"expert_dropout must be in \[0, 1\)"),
        ({"init_scale": 0.0}, "init_scale must be more than 0"),
    ],
)
def test_options_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterOptions(**fields)


def test_wrong_batches() -> None:
    model = Mixtral.from_config(small_config(vocab_size=50))
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 50\), got 77"):
        model.loss(Batch.from_documents([[1, 77, 3]]))
    with pytest.raises(ValueError, match="at least two tokens"):
        Batch.from_documents([[4], []])
    with pytest.raises(ValueError, match="scored must have one value"):
        Batch.from_documents([[4, 5, 6]], [[True]])
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got int8"):
        Mixtral.from_config(small_config(), dtype="int8")


def test_batches_of_documents() -> None:
    batch = Batch.from_documents([[3, 4, 5], [9], [6, 7]], [[0, 1, 0], [1], [1, 1]])
    assert batch.input_ids.tolist() == [3, 4, 6] and batch.labels.tolist() == [4, -100, 7]
    assert batch.positions.tolist() == [0, 1, 0] and batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.targets == 2 and batch.tokens == 3 and batch.cu_seqlens.dtype == torch.int32
