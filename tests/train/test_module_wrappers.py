"""The model for training is a module like any other: DDP, FSDP2, PEFT, torch.compile, hooks, copies."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, get_peft_model

from mixtral.train import Batch, Mixtral, RouterOptions
from training_models import DENSE, livelier, random_batch, small_config
from two_processes import DOCUMENTS, OPTIONS, run


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    model = livelier(Mixtral.from_config(small_config(), router=OPTIONS))
    model.save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(run, (tmp_path, tmp_path / "model"), nprocs=2)
    results = torch.load(tmp_path / "results.pt")

    model.loss(Batch.from_documents(DOCUMENTS)).total.backward()
    for name, weight in model.named_parameters():
        error = (results["gradients"][name] - weight.grad).norm()
        assert error <= 1e-6 * weight.grad.norm().clamp(min=1), f"DDP: {name}: {error:.2g}"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(Batch.from_documents(DOCUMENTS)).total.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(results["weights"][name], weight, rtol=1e-6, atol=1e-6, msg=f"FSDP: {name}")
        assert torch.equal(results["weights"][name], results["checkpointed"][name]), name
    for name, weight in Mixtral.from_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(weight, results["weights"][name]), name


@pytest.mark.parametrize("fields", [{}, DENSE], ids=["sparse", "dense"])
def test_gradient_checkpointing_changes_no_bit(fields: dict) -> None:
    model = livelier(Mixtral.from_config(small_config(**fields)))
    batch = random_batch(model.config)
    runs = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        losses = model.loss(batch)
        losses.total.backward()
        runs.append([losses.total, *(weight.grad.clone() for weight in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("fields", [{}, DENSE], ids=["sparse", "dense"])
def test_lora(fields: dict) -> None:
    model = livelier(Mixtral.from_config(small_config(**fields)))
    batch = random_batch(model.config)
    before = copy.deepcopy(model.state_dict())
    start = model.loss(batch).cross_entropy
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(
        r=4,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] + (["gate_proj", "down_proj"] if fields else []),
        target_parameters=None if fields else experts,
    )
    tuned = get_peft_model(model, lora)
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    assert 0 < sum(x.numel() for x in trained) < 0.5 * sum(x.numel() for x in before.values())
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(8):
        losses = tuned(batch)
        optimizer.zero_grad()
        losses.total.backward()
        assert all(weight.grad is not None for weight in trained)
        optimizer.step()
    tuned_loss = tuned(batch).cross_entropy
    assert tuned_loss < start - 0.1
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged.loss(batch).cross_entropy, tuned_loss, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(before)
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    assert all(("_proj" in name) for name in changed) and len(changed) == (12 if fields else 12)


@pytest.mark.parametrize("fields", [{}, DENSE], ids=["sparse", "dense"])
def test_compile(fields: dict) -> None:
    model = livelier(Mixtral.from_config(small_config(**fields)))
    batch = random_batch(model.config)
    expected = model.loss(batch)
    expected.total.backward()
    grads = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    losses = torch.compile(model, backend="aot_eager")(batch)
    losses.total.backward()
    torch.testing.assert_close(losses.total, expected.total, rtol=1e-6, atol=1e-6)
    for weight, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-5, atol=1e-6)


def test_hooks_see_every_module_and_input() -> None:
    model = livelier(Mixtral.from_config(small_config()))
    seen = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.add(name))
    model(random_batch(model.config).input_ids[None])
    assert seen == {name for name, _ in model.named_modules()} - {"model.layers"}  # a list computes nothing


def test_copies_and_files(tmp_path: Path) -> None:
    model = livelier(Mixtral.from_config(small_config(), router=RouterOptions(balance="loss_free"), dtype="bfloat16"))
    model.update_balance(torch.arange(8).view(2, 4))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = Mixtral.from_config(small_config(), router=RouterOptions(balance="loss_free"), dtype="bfloat16", seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    input_ids = random_batch(model.config).input_ids[None]
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids), model(input_ids))
        assert twin.config.to_dict() == model.config.to_dict() and twin.config is not model.config
    assert model(input_ids).dtype == torch.float32
