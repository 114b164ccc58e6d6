"""Cross-entropy and distillation in chunks: values and gradients, what is left out, what is held, and threads."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import mixtral.ops as ops
from comparing import assert_close, gradients
from mixtral import train
from mixtral.train import cross_entropy

T, H, V = 150, 24, 70
NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", request.param)


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
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 20 * V)
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
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 2**17)
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


def test_distillation_tells_its_hard_part_from_the_same_product(chunks, monkeypatch):
    hidden, weight, labels, weights = vocabulary_case()
    teacher, expected = torch.randn(T, V), train.linear_cross_entropy(hidden, weight, labels, weights)
    products, make = [], cross_entropy._logits
    monkeypatch.setattr(cross_entropy, "_logits", lambda *of: products.append(len(of[0])) or make(*of))
    mixed, hard = train.distill_cross_entropies((hidden, weight), teacher, labels, weights, temperature=2.0)
    assert sum(products) == (labels >= 0).sum()
    assert torch.equal(hard, expected) and not hard.requires_grad
    assert torch.equal(mixed, train.distill_cross_entropy((hidden, weight), teacher, labels, weights, temperature=2.0))
    assert_close(train.distill_cross_entropies(hidden @ weight.T, teacher, labels, weights)[1], hard)


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
