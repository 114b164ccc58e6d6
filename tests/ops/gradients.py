"""What the tests of gradients share: references, random cases, threads, instruction sets and the ways of autograd.

A gradient passes when every element is as near to autograd of the f64 reference as twice the largest error of autograd
of the same reference in the op's dtype ("plain PyTorch"), or as the bound that the caller gives. The bound matters
where plain PyTorch has few numbers to err on, and is exact by chance.
"""

import os
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mixtral.ops as ops
from conftest import share_of_bound, with_threads
from error_bounds import U, half_ulp
from mixtral import reference

CASES = int(os.environ.get("MIXTRAL_GRADIENT_CASES", 150))  # random ones, of each op and dtype
RANDOM_CASE_DTYPES = [torch.float32, torch.bfloat16]

Results = Tensor | tuple[Tensor, ...]


def as_tuple(results: Results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def wide(arguments: tuple) -> tuple:
    """Tensors of floats in f64, everything else as it is."""
    return tuple(x.double() if is_float(x) else x for x in arguments)


def gradients(
    function: Callable[..., Results],
    arguments: tuple,
    grads: tuple[Tensor | None, ...],
    wanted: tuple[int, ...] | None = None,
) -> list[Tensor | None]:
    """Of the float tensors among ``arguments``, in order, or of those at the places ``wanted``; the others: None.

    ``grads``: those of the float results, in order; None: the result is not used.
    """
    floats = [i for i, x in enumerate(arguments) if is_float(x)]
    wanted = tuple(floats) if wanted is None else wanted
    leaves = [x.detach().requires_grad_(i in wanted) if is_float(x) else x for i, x in enumerate(arguments)]
    with torch.enable_grad():
        results = [x for x in as_tuple(function(*leaves)) if x.is_floating_point()]
    used = [(x, grad.to(x.dtype)) for x, grad in zip(results, grads, strict=True) if grad is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return [leaves[i].grad for i in floats]


def random_grads(function: Callable[..., Results], arguments: tuple) -> tuple[Tensor, ...]:
    """One for each float result, rounded to its dtype."""
    with torch.no_grad():
        results = [x for x in as_tuple(function(*arguments)) if x.is_floating_point()]
    return tuple(torch.randn(x.shape, device=x.device, dtype=torch.float64).to(x.dtype) for x in results)


def few_roundings(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound of those who give none: the rounding to ``dtype`` and eight roundings to f32, of the largest number."""
    largest = exact.abs().amax() if exact.numel() > 0 else exact.new_zeros(())
    return (half_ulp(largest, dtype) + 8 * U * largest).expand(exact.shape)


def assert_gradients_within_tolerance(
    op: str, arguments: tuple, bounds: Callable[..., tuple[Tensor | None, ...]] | None = None
) -> None:
    """Gradients of ``mixtral.ops.<op>`` against those of ``mixtral.reference.<op>`` at random gradients of the results.

    ``bounds(*grads, *arguments)`` gives one for each float tensor among ``arguments``, None: that of few roundings.
    """
    plain = getattr(reference, op)
    grads = random_grads(plain, arguments)
    actual = gradients(getattr(ops, op), arguments, grads)
    oracles = gradients(plain, wide(arguments), wide(grads))
    plains = gradients(plain, arguments, grads)
    allowed = bounds(*grads, *arguments) if bounds else [None] * len(actual)
    floats = [x for x in arguments if is_float(x)]
    for i, (x, own, oracle, other, bound) in enumerate(zip(floats, actual, oracles, plains, allowed, strict=True)):
        assert own.dtype == x.dtype, f"{op}: gradient {i} is {own.dtype}, its input {x.dtype}"
        bound = few_roundings(oracle, x.dtype) if bound is None else bound
        error = (other.double() - oracle).abs()
        bound = bound.clamp(min=2 * error.max().item()) if error.numel() > 0 else bound
        share = share_of_bound(own, oracle, bound)
        assert share <= 1, f"{op}: gradient {i} has an error of {share:.3g} times what is allowed"


def assert_random_cases(
    op: str,
    make: Callable[[torch.dtype], tuple],
    device: str,
    dtype: torch.dtype,
    bounds: Callable[..., tuple[Tensor | None, ...]] | None = None,
    cases: int = CASES,
) -> None:
    """``make(dtype)`` gives random arguments on the CPU; a failure names the seed, from which the case follows.

    What an op allocates starts as NaN, so that a value that no kernel writes shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for seed in range(cases):
            torch.manual_seed(seed)
            try:
                arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in make(dtype))
                assert_gradients_within_tolerance(op, arguments, bounds)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def size(largest: int) -> int:
    """At least 1; as often small as large."""
    return int(2 ** (torch.rand(()).item() * torch.tensor(largest + 0.5).log2().item()))


def gradcheck_reference(forward: Callable[..., Results], backward: Callable[..., tuple], *inputs: Tensor) -> None:
    """``backward(*grads, *inputs)``, a closed form, against finite differences of ``forward(*inputs)``, all f64."""

    class ClosedForm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs: Tensor) -> Results:
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *grads: Tensor) -> Results:
            return backward(*grads, *ctx.saved_tensors)

    assert torch.autograd.gradcheck(ClosedForm.apply, [x.double().requires_grad_() for x in inputs])


def assert_same_with_one_and_two_threads(op: str, arguments: tuple) -> None:
    function = getattr(ops, op)
    grads = random_grads(function, arguments)
    one, two = (with_threads(n, lambda: gradients(function, arguments, grads)) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


class BackwardOps(TorchDispatchMode):
    """Records, for each ``mixtral::*_backward*`` op that runs, the total number of elements of its results."""

    def __init__(self):
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        if op.namespace == "mixtral" and "_backward" in op.__name__:
            self.elements.append(sum(x.numel() for x in as_tuple(results)))
        return results


def assert_only_wanted_gradients(op: str, arguments: tuple, extra: int = 0) -> None:
    """Whichever inputs require gradients, theirs have the bits that they have together, and others are not computed.

    ``extra``: elements that the backward ops may return beyond the gradients that are wanted.
    """
    function = getattr(ops, op)
    grads = random_grads(function, arguments)
    floats = [i for i, x in enumerate(arguments) if is_float(x)]
    everything = gradients(function, arguments, grads)
    for choice in product([False, True], repeat=len(floats)):
        if not any(choice):
            continue
        wanted = tuple(i for i, chosen in zip(floats, choice, strict=True) if chosen)
        with BackwardOps() as recorded:
            some = gradients(function, arguments, grads, wanted)
        for chosen, actual, expected in zip(choice, some, everything, strict=True):
            assert (actual is not None) == chosen and (actual is None or torch.equal(actual, expected))
        assert sum(recorded.elements) <= sum(arguments[i].numel() for i in wanted) + extra


def assert_compiles(op: str, arguments: tuple) -> None:
    """A function around the op compiles as one graph with its backward, to the same gradients."""

    def function(*inputs) -> tuple[Tensor, ...]:
        results = as_tuple(getattr(ops, op)(*(2 * x if is_float(x) else x for x in inputs)))
        return tuple(3 * x if x.is_floating_point() else x for x in results)

    grads = random_grads(function, arguments)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        gradients(compiled, arguments, grads), gradients(function, arguments, grads), strict=True
    ):
        assert torch.equal(actual, expected)


def second_derivative(op: str, arguments: tuple) -> None:
    """Differentiates the gradients of ``op``: an error in words, unless a test says otherwise."""
    leaves = [x.detach().requires_grad_() if is_float(x) else x for x in arguments]
    with torch.enable_grad():
        total = sum(x.square().sum() for x in as_tuple(getattr(ops, op)(*leaves)) if x.is_floating_point())
        inputs = [x for x in leaves if is_float(x)]
        first = torch.autograd.grad(total, inputs, create_graph=True)
        sum(x.sum() for x in first).backward()
