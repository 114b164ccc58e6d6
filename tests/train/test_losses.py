"""The losses of training: conventions of balance, z-loss, chunked cross-entropy, distillation, and what masks leave."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import mixtral.ops as ops
from mixtral import reference, train
from mixtral.train import losses

E, K, L = 8, 2, 3
NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_logits(tokens: int, layers: int = L) -> list[Tensor]:
    return [(2 * torch.randn(tokens, E)).requires_grad_() for _ in range(layers)]


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, retain_graph=True))


def assert_close(actual: object, expected: object, rtol: float = 1e-6) -> None:
    """To ``rtol`` of the largest number."""
    if isinstance(actual, list | tuple):
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, rtol)
    else:
        scale = expected.abs().max().item() if expected.numel() > 0 else 0.0
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=rtol * max(scale, 1e-30))


# ---- balance ---------------------------------------------------------------------------------------------------------


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


# ---- vocabulary ------------------------------------------------------------------------------------------------------

T, H, V = 150, 24, 70


def vocabulary_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], labels [T] with some of -100, weights [T]."""
    hidden = torch.randn(T, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / H**0.5 * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    labels[torch.rand(T) < 0.2] = -100
    return hidden, weight, labels, torch.rand(T)


def plain_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    each = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return (each if weights is None else each * weights).sum()


def plain_distillation(logits, teacher, labels, weights, alpha, temperature) -> Tensor:
    kept = labels != -100
    target = (teacher[kept] / temperature).softmax(-1)
    soft = -(target * (logits[kept] / temperature).log_softmax(-1)).sum(-1) * temperature**2
    return (1 - alpha) * plain_cross_entropy(logits, labels, weights) + alpha * (weights[kept] * soft).sum()


@pytest.fixture(params=[10**9, 1000, 1], ids=["one chunk", "chunks", "rows"])
def chunks(request, monkeypatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_is_that_of_plain_torch(dtype, weighted, chunks):
    """Within twice the error that autograd of plain PyTorch makes in this dtype."""
    hidden, weight, labels, weights = vocabulary_case(dtype)
    weights = weights if weighted else None
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    oracle = plain_cross_entropy(wide[0] @ wide[1].T, labels, weights)
    plain = plain_cross_entropy((hidden @ weight.T).float(), labels, weights)
    actual = train.linear_cross_entropy(hidden, weight, labels, weights)
    assert actual.dtype == torch.float32 and actual.shape == ()
    results = [
        [x, *gradients(x, leaves)]
        for x, leaves in ((oracle, wide), (plain, [hidden, weight]), (actual, [hidden, weight]))
    ]
    for exact, other, own in zip(*results, strict=True):
        allowed = 2 * (other.double() - exact).abs().max() + torch.finfo(own.dtype).eps * exact.abs().max()
        assert (own.double() - exact).abs().max() <= allowed
    assert (results[2][1][labels == -100] == 0).all()


def test_logits_are_those_of_the_model():
    hidden, weight, labels, _ = vocabulary_case(torch.bfloat16)
    logits = ops.grouped_gemm(hidden, weight[None], torch.tensor([T])).float()
    assert_close(train.linear_cross_entropy(hidden, weight, labels), plain_cross_entropy(logits, labels, None), 1e-7)


def test_tokens_without_a_label_change_no_bit(chunks):
    hidden, weight, labels, weights = vocabulary_case()
    kept = labels != -100
    broken = hidden.detach().masked_fill(~kept[:, None], NAN).requires_grad_()
    teacher = torch.randn(T, V)
    broken_teacher = teacher.masked_fill(~kept[:, None], NAN)
    broken_weights = weights.masked_fill(~kept, NAN)
    for actual, expected in (
        (
            train.linear_cross_entropy(broken, weight, labels, broken_weights),
            train.linear_cross_entropy(hidden[kept], weight, labels[kept], weights[kept]),
        ),
        (
            train.distill_cross_entropy((broken, weight), broken_teacher, labels, broken_weights),
            train.distill_cross_entropy((hidden[kept], weight), teacher[kept], labels[kept], weights[kept]),
        ),
    ):
        assert torch.equal(actual, expected)
        of_broken, of_weight = gradients(actual, [broken, weight])
        of_hidden, expected_of_weight = gradients(expected, [hidden, weight])
        assert torch.equal(of_broken, of_hidden) and torch.equal(of_weight, expected_of_weight)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns, and the names of mixtral's operators."""

    def __init__(self):
        super().__init__()
        self.elements, self.names = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else (results,):
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        self.names += [op.__name__.partition(".")[0]] if op.namespace == "mixtral" else []
        return results


def test_logits_of_all_tokens_are_never_held(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 20 * V)
    hidden, weight, labels, _ = vocabulary_case()
    teacher = torch.randn(T, 5), torch.randint(0, V, (T, 5))
    for call in (
        lambda: train.linear_cross_entropy(hidden, weight, labels),
        lambda: train.distill_cross_entropy((hidden, weight), teacher, labels),
    ):
        with LargestTensor() as largest:
            call().backward()
        assert largest.elements == max(T * H, 20 * V, V * H) < T * V


def test_gradients_that_nobody_wants_are_not_computed():
    hidden, weight, labels, _ = vocabulary_case()
    with torch.no_grad(), LargestTensor() as silent:
        expected = train.linear_cross_entropy(hidden, weight, labels)
    assert silent.names == ["grouped_gemm"]
    both = gradients(train.linear_cross_entropy(hidden, weight, labels), [hidden, weight])
    for wanted, kept in ((0, "grouped_gemm_backward_input"), (1, "grouped_gemm_backward_weight")):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((hidden, weight))]
        with LargestTensor() as recorded:
            value = train.linear_cross_entropy(*leaves, labels)
            value.backward()
        assert torch.equal(value, expected) and recorded.names == ["grouped_gemm", kept]
        assert torch.equal(leaves[wanted].grad, both[wanted]) and leaves[1 - wanted].grad is None


def test_no_targets_is_no_loss():
    hidden, weight, labels, _ = vocabulary_case()
    for value in (
        train.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)),
        train.distill_cross_entropy((hidden, weight), torch.randn(T, V), torch.full_like(labels, -100)),
    ):
        assert value.item() == 0
        assert all((x == 0).all() for x in gradients(value, [hidden, weight]))


def test_bits_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2**17)
    hidden, weight = (torch.randn(n, 64).bfloat16().requires_grad_() for n in (1500, 300))
    labels, weights, teacher = torch.randint(0, 300, (1500,)), torch.rand(1500), torch.randn(1500, 300)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for value in (
                train.linear_cross_entropy(hidden, weight, labels, weights),
                train.distill_cross_entropy((hidden, weight), teacher, labels, weights),
            ):
                results += [value, *gradients(value, [hidden, weight])]
    finally:
        torch.set_num_threads(before)
    for one, two in zip(results[:6], results[6:], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.25, 1.0), (0.5, 3.0), (1.0, 0.5)])
def test_distillation_in_every_form_is_that_of_plain_torch(alpha, temperature, chunks):
    hidden, weight, labels, weights = vocabulary_case()
    teacher = 2 * torch.randn(T, V)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    options = (labels, weights, alpha, temperature)
    expected = plain_distillation(wide[0] @ wide[1].T, teacher.double(), *options)
    for student in ((hidden, weight), hidden @ weight.T):
        for taught in (teacher, tuple(teacher.topk(V)), tuple(teacher.log_softmax(-1).topk(V))):
            actual = train.distill_cross_entropy(student, taught, *options)
            assert_close(actual, expected, 2e-6)
            assert_close(gradients(actual, [hidden, weight]), gradients(expected, wide), 2e-5)


def test_top_m_teacher_is_renormalised():
    hidden, weight, labels, weights = vocabulary_case()
    teacher = 2 * torch.randn(T, V)
    values, ids = teacher.topk(4)
    others = torch.full_like(teacher, -1e4).scatter(1, ids, values)
    for student in ((hidden, weight), hidden @ weight.T):
        expected = train.distill_cross_entropy(student, others, labels, weights)
        assert_close(train.distill_cross_entropy(student, (values, ids), labels, weights), expected, 1e-6)


def test_alpha_weighs_hard_and_soft():
    hidden, weight, labels, weights = vocabulary_case()
    student, teacher = (hidden, weight), torch.randn(T, V)
    hard, soft, mixed = (
        train.distill_cross_entropy(student, teacher, labels, weights, **options)
        for options in ({"alpha": 0.0}, {"alpha": 1.0}, {})
    )
    assert torch.equal(hard, train.linear_cross_entropy(hidden, weight, labels, weights))
    assert_close(mixed, 0.75 * hard + 0.25 * soft)
    own = (hidden @ weight.T).detach()  # a student that is its teacher has nothing to learn from it
    value = train.distill_cross_entropy(student, own, labels, alpha=1.0, temperature=2.0)
    assert all(x.abs().max() < 1e-4 for x in gradients(value, [hidden, weight]))


def test_teacher_gets_no_gradient():
    hidden, weight, labels, _ = vocabulary_case()
    teacher = torch.randn(T, V, requires_grad=True)
    train.distill_cross_entropy(hidden @ weight.T, teacher, labels).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"labels": torch.zeros(T)}, rf"labels must be integers \[{T}\], got torch.float32 \[{T}\]"),
        ({"labels": torch.zeros(3).long()}, rf"labels must be integers \[{T}\], got torch.int64 \[3\]"),
    ],
)
def test_bad_arguments_of_distillation_raise(options, message):
    hidden, weight, labels, _ = vocabulary_case()
    arguments = {"student": (hidden, weight), "teacher": torch.randn(T, V), "labels": labels} | options
    with pytest.raises(ValueError, match="distill_cross_entropy: " + message):
        train.distill_cross_entropy(**arguments)


def test_bad_arguments_of_cross_entropy_raise():
    hidden, weight, labels, _ = vocabulary_case()
    with pytest.raises(ValueError, match="linear_cross_entropy: labels must be integers"):
        train.linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(RuntimeError, match="grouped_gemm: b"):
        train.linear_cross_entropy(hidden, weight.bfloat16(), labels)
