"""Large gradients of weights on the CPU have the memory of earlier ones (csrc/ops/cpu/reused_memory.h)."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import mixtral.ops as ops

EXPERTS, COLUMNS, DEPTH = 2, 4096, 2048  # 32 MiB of bf16


def weight_gradient(columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """[E, columns, DEPTH]."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(3, columns, generator=generator).bfloat16()
    a = torch.randn(3, DEPTH, generator=generator).bfloat16()
    return torch.ops.mixtral.grouped_gemm_backward_weight(grad, a, torch.tensor([1, 3], dtype=torch.int32))


def lazily_free() -> int:
    """KiB of this process that the kernel may take."""
    return int(re.search(r"LazyFree: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])


def test_a_freed_gradient_gives_its_memory_to_the_next() -> None:
    first = weight_gradient()
    place, expected = first.data_ptr(), first.clone()
    other = weight_gradient(seed=1)
    assert other.data_ptr() != place and torch.equal(first, expected)
    del first
    again = weight_gradient()
    assert again.data_ptr() == place and torch.equal(again, expected)


def test_an_expert_without_tokens_gets_zeros_in_used_memory() -> None:
    used = weight_gradient()
    place = used.data_ptr()
    used.fill_(float("nan"))
    del used
    grad, a = torch.ones(1, COLUMNS).bfloat16(), torch.ones(1, DEPTH).bfloat16()
    out = torch.ops.mixtral.grouped_gemm_backward_weight(grad, a, torch.tensor([0, 1], dtype=torch.int32))
    assert out.data_ptr() == place
    assert (out[0] == 0).all() and (out[1] == 1).all()


def test_gradients_of_a_step_are_those_of_the_step_before() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1024, generator=generator)
    gate_up = torch.randn(2, 4096, 1024, generator=generator).requires_grad_()
    down = torch.randn(2, 1024, 2048, generator=generator).requires_grad_()
    weights, ids = torch.full((4, 1), 1.0), torch.tensor([[0], [1], [1], [0]], dtype=torch.int32)
    places = []
    for _ in range(3):
        ops.moe_mlp(x, weights, ids, gate_up, down).sum().backward()
        places.append(gate_up.grad.data_ptr())
        gate_up.grad = down.grad = None
    assert gate_up.nbytes == 32 << 20 and places[0] == places[1] == places[2]


def test_memory_that_waits_is_the_systems_to_take() -> None:
    gradient = weight_gradient()
    before = lazily_free()
    del gradient
    assert lazily_free() == before + (32 << 10)
    again = weight_gradient()
    assert again is not None and lazily_free() == before


def test_results_outlive_everything_else() -> None:
    """A gradient that is freed when the interpreter ends."""
    program = (
        "import sys, torch, mixtral.ops\n"
        "one = torch.tensor([1], dtype=torch.int32)\n"
        "sys.kept = torch.ops.mixtral.grouped_gemm_backward_weight(torch.ones(1, 4096), torch.ones(1, 2048), one)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
