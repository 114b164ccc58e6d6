"""Muon: the matrices of its update, torch's own on single matrices, stacks, threads, and which weights it takes."""

import pytest
import torch

from mixtral.train import Mixtral
from mixtral.train.muon import Muon, orthogonalize
from mixtral.train.optimizer import Optimizer
from mixtral.train.settings import TrainSettings
from training_models import small_config

SHAPES = [(24, 24), (40, 96), (96, 40)]


def gradient(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    g = gradient(*shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    found = torch.linalg.svdvals(orthogonalize(g))
    assert found.min() > 0.5 and found.max() < 1.3
    # In the basis of the gradient's singular vectors the update is diagonal.
    inner = u.T @ orthogonalize(g) @ vh.T
    assert (inner - inner.diagonal().diag()).abs().max() < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_three_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(gradient(*shape, seed=9)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    mine, torchs = Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for step in range(3):
        ours.grad, theirs.grad = gradient(*shape, seed=step), gradient(*shape, seed=step)
        mine.step()
        torchs.step()
    moved = (theirs - gradient(*shape, seed=9)).norm()
    assert (ours - theirs).norm() < 0.03 * moved  # both iterate in bf16


def test_each_matrix_of_a_stack_is_orthogonalised_by_itself() -> None:
    stack = gradient(3, 32, 64)
    stack[1] *= 1000
    assert torch.equal(orthogonalize(stack), torch.stack([orthogonalize(g) for g in stack]))


def test_threads_do_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(orthogonalize(gradient(4, 96, 192)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    """As that of an expert without tokens."""
    assert not orthogonalize(torch.zeros(2, 32, 32)).any()


def test_adamw_keeps_embeddings_head_routers_and_norms() -> None:
    model = Mixtral.from_config(small_config())
    optimizer = Optimizer(model, TrainSettings(steps=1, optimizer="muon"))
    by_muon = {name for name, moments in optimizer.moments.items() if "exp_avg_sq" not in moments}
    kinds = {".".join(name.split(".")[3:]) for name in by_muon}
    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    assert kinds == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
