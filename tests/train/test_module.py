"""The model for training against the C++ model and against transformers."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from training_models import (
    CROSS_ENTROPY_ALONE,
    DENSE,
    SWITCH,
    in_transformers,
    livelier,
    random_batch,
    random_config,
    small_config,
)
from transformers.models.mixtral import modeling_mixtral

import mixtral
from mixtral.train import Batch, Mixtral, RouterOptions, StepTotals


@pytest.mark.parametrize("seed", range(24))
def test_logits_are_those_of_the_cpp_model_bit_for_bit(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    model = livelier(Mixtral.from_config(config)).to_dtype([torch.float32, torch.bfloat16][seed % 2]).eval()
    for bias in model.buffers():
        bias.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "model", ["huggingface", "huggingface_v4", "consolidated"][seed % 3])
    input_ids = torch.randint(config.vocab_size, (3, 19))
    with torch.no_grad():
        logits = model(input_ids)
    assert torch.equal(logits, mixtral.Mixtral.from_pretrained(tmp_path / "model")(input_ids))


@pytest.mark.parametrize("fields", [{}, DENSE, {"tie_word_embeddings": True}], ids=["sparse", "dense", "tied"])
def test_names_and_shapes_are_those_of_transformers(fields: dict, tmp_path: Path) -> None:
    model = Mixtral.from_config(small_config(**fields))
    twin = in_transformers(model, tmp_path / "model")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in twin.state_dict().items()}
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in twin.named_parameters()}


def switch_router(self, hidden_states):
    """transformers' router without renormalisation."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    logits = functional.linear(hidden_states, self.weight)
    weights, ids = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1)
    return logits, weights, ids


def mean_loss(twin: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Of transformers: one row in which positions begin anew with every sequence."""
    logits = twin(batch.input_ids[None], position_ids=batch.positions[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits, batch.labels)


CASES = {
    "dense": DENSE,
    "top-2": {},
    "switch": SWITCH,
    "window": {"window": 5},
    "dense window tied": DENSE | {"window": 4, "tie_word_embeddings": True},
    "top-3 tied": {"top_k": 3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_ten_steps_agree_with_transformers(
    case: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(**CASES[case])
    if not config.renormalize:
        monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", switch_router)
    model = livelier(Mixtral.from_config(config, router=CROSS_ENTROPY_ALONE))
    twin = in_transformers(model, tmp_path / "model")
    batch = random_batch(config, (9, 2, 30, 17) if packed else (40,))

    model.loss(batch).total.backward()
    mean_loss(twin, batch).backward()
    expected = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        error = (weight.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error <= 1e-4, f"{name}: {error:.2g}"

    optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-3) for x in (model, twin)]
    for step in range(10):
        losses = model.loss(batch).total, mean_loss(twin, batch)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(losses[0].item() / losses[1].item() - 1) <= 1e-4, f"step {step}"


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_padding_changes_no_bit() -> None:
    config = small_config(window=6)
    model = livelier(Mixtral.from_config(config))
    rows = [torch.randint(config.vocab_size, (length,)) for length in (7, 12, 3)]
    input_ids, mask = torch.full((3, 20), 55), torch.zeros(3, 20)
    for b, row in enumerate(rows):
        begin = (0, 8, 5)[b]  # padding on the right, the left, and both
        input_ids[b, begin : begin + len(row)], mask[b, begin : begin + len(row)] = row, 1
    results = []
    for fill in (55, 0):
        batch = Batch.from_padded(input_ids.masked_fill(mask == 0, fill), mask)
        assert batch.tokens == 22 and batch.cu_seqlens.tolist() == [0, 7, 19, 22]
        model.zero_grad()
        losses = model.loss(batch)
        losses.total.backward()
        results.append((losses, gradients(model)))
    documents = Batch.from_padded(torch.cat(rows)[None])
    assert torch.equal(documents.input_ids, batch.input_ids)
    (first, first_grads), (second, second_grads) = results
    assert torch.equal(first.total, second.total)
    assert all(torch.equal(grad, second_grads[name]) for name, grad in first_grads.items())


@pytest.mark.parametrize("balance", ["switch", "global"])
def test_microbatches_add_up_to_their_step(balance: str) -> None:
    config = small_config()
    model = livelier(Mixtral.from_config(config, router=RouterOptions(balance=balance)))
    documents = [torch.randint(config.vocab_size, (length,)).tolist() for length in (5, 31, 2, 17, 9, 12, 26, 40)]
    whole = Batch.from_documents(documents)
    expected = model.loss(whole)
    expected.total.backward()
    expected_grads = gradients(model)

    model.zero_grad()
    step = StepTotals(whole.targets, whole.tokens, expected.load)
    parts = [model.loss(Batch.from_documents([document]), step) for document in documents]
    for part in parts:
        part.total.backward()
    total = {name: sum(getattr(part, name) for part in parts) for name in expected._fields if name != "max_logit"}
    assert torch.equal(total["load"], expected.load)
    assert (total["targets"], total["tokens"]) == (expected.targets, expected.tokens)
    for name in ("cross_entropy", "z"):
        torch.testing.assert_close(total[name], getattr(expected, name), rtol=1e-6, atol=1e-6)
    if balance == "global":  # a loss over each microbatch is another one than that over all
        torch.testing.assert_close(total["total"], expected.total, rtol=1e-6, atol=1e-6)
        for name, grad in gradients(model).items():
            assert (grad - expected_grads[name]).norm() <= 1e-6 * expected_grads[name].norm().clamp(min=1), name
    else:
        shares = [model.loss(Batch.from_documents([document])).balance * (len(document) - 1) for document in documents]
        torch.testing.assert_close(total["balance"], sum(shares) / whole.tokens, rtol=1e-6, atol=1e-6)


def test_twenty_steps_have_the_same_bits_with_any_number_of_threads() -> None:
    config = small_config(vocab_size=128, hidden_size=64, intermediate_size=96, head_dim=16)
    batches = [random_batch(config, (60, 90, 33, 70), seed) for seed in range(4)]

    def train() -> tuple[list, dict]:
        model = Mixtral.from_config(config, seed=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        history = []
        for step in range(20):
            losses = model.loss(batches[step % 4])
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            history.append(losses.total.item())
        return history, model.state_dict()

    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(train())
    finally:
        torch.set_num_threads(threads)
    assert runs[0][0][-1] < runs[0][0][0] - 0.1
    for history, weights in runs[1:]:
        assert history == runs[0][0]
        assert all(torch.equal(weight, runs[0][1][name]) for name, weight in weights.items())
