"""Models of transformers train on our ops: under Trainer, with PEFT, and with the corrected balance loss."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from mixtral.integrations import transformers as integration
from mixtral.train import load_balance_loss

VOCABULARY, LENGTH = 96, 40


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


def make_model(implementation: str, **overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        sliding_window=16,
        initializer_range=0.15,
        **overrides,
    )
    return MixtralForCausalLM._from_config(
        config, attn_implementation=implementation, experts_implementation=implementation
    )


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Padded rows of different lengths."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for i in range(count):
        length = LENGTH - 7 * (i % 3)
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < length).long()
        result.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return result


def loss_curve(model: PreTrainedModel, folder: Path, **overrides: object) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **overrides,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(32))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    torch.manual_seed(5)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(model, lora)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_loss_curve_is_that_of_eager(lora: bool, checkpointing: bool, tmp_path: Path) -> None:
    curves = []
    for implementation in ("eager", "mixtral"):
        model = make_model(implementation)
        model = with_lora(model) if lora else model
        extra = {}
        if checkpointing and implementation == "mixtral":
            if lora:
                model.enable_input_require_grads()
            extra = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        curves.append(loss_curve(model, tmp_path, **extra))
    eager, ours = torch.tensor(curves[0]), torch.tensor(curves[1])
    assert len(eager) == 20 and eager[-1] < eager[0] - 0.03
    assert (ours - eager).abs().max() <= 1e-4 * eager.max(), (ours - eager).abs().max()


def test_lora_of_experts_has_gradients() -> None:
    model = with_lora(make_model("mixtral"))
    batch = {name: torch.stack([row[name] for row in rows(3)]) for name in ("input_ids", "attention_mask", "labels")}
    model(**batch).loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("experts" in name for name in trained) and any("q_proj" in name for name in trained)
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
    assert all(grad.abs().max() > 0 for name, grad in trained.items() if "lora_B" in name)


def a_batch(count: int = 3) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows(count)]) for name in ("input_ids", "attention_mask", "labels")}


def expected_balance(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, output_router_logits=True).router_logits
    return load_balance_loss(logits, 2, "mixtral", batch["attention_mask"].flatten().bool())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_corrected_balance_loss(checkpointing: bool) -> None:
    model, batch = make_model("mixtral", router_aux_loss_coef=0.3).train(), a_batch()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = model(**batch).loss
    balance = expected_balance(copy.deepcopy(model), batch)
    cross_entropy = functional.cross_entropy(
        model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
    )
    torch.testing.assert_close(plain, cross_entropy)  # transformers itself: no balance loss
    with integration.correct_load_balance_loss():
        outputs = model(**batch)
        torch.testing.assert_close(outputs.loss, cross_entropy + 0.3 * balance)
        torch.testing.assert_close(outputs.aux_loss, balance)
        outputs.loss.backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        torch.testing.assert_close(model(**batch, return_dict=False)[0], outputs.loss)
        torch.testing.assert_close(model(**batch, output_router_logits=False).loss, cross_entropy)
        torch.testing.assert_close(model.eval()(**batch).loss, cross_entropy)
        none = make_model("mixtral", router_aux_loss_coef=0.0).train()
        assert none(**batch).aux_loss is None
        with pytest.raises(RuntimeError, match="in force already"):
            integration.correct_load_balance_loss()
    torch.testing.assert_close(model.train()(**batch).loss, cross_entropy)  # and back
    model.zero_grad()
    model.gradient_checkpointing_disable()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**inputs, output_router_logits=True)
    mask = batch["attention_mask"].flatten().bool()
    total = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (total + 0.3 * load_balance_loss(outputs.router_logits, 2, "mixtral", mask)).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_microbatches_count_by_their_share_of_the_labels() -> None:
    model, batch = make_model("mixtral", router_aux_loss_coef=0.3).train(), a_batch(2)
    parts = [{name: value[b : b + 1] for name, value in batch.items()} for b in range(2)]
    labels = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    with integration.correct_load_balance_loss():
        losses = [model(**part, num_items_in_batch=sum(labels)) for part in parts]
        alone = [model(**part) for part in parts]
    for part, whole, count in zip(losses, alone, labels, strict=True):
        torch.testing.assert_close(part.loss, whole.loss * count / sum(labels))
        torch.testing.assert_close(part.aux_loss, whole.aux_loss)


def test_other_conventions() -> None:
    model, batch = make_model("mixtral", router_aux_loss_coef=0.3).train(), a_batch()
    theirs = model(**batch, output_router_logits=True)
    with integration.correct_load_balance_loss("hf"):
        torch.testing.assert_close(model(**batch).loss, theirs.loss)
    with pytest.raises(ValueError, match="unknown load-balancing convention 'pooled'"):
        integration.correct_load_balance_loss("pooled")
    assert not hasattr(MixtralForCausalLM.forward, "load_balance_convention")


def test_trainer_uses_the_corrected_loss(tmp_path: Path) -> None:
    curves = []
    for coefficient in (0.0, 0.3):
        with integration.correct_load_balance_loss():
            model = make_model("mixtral", router_aux_loss_coef=coefficient)
            curves.append(loss_curve(model, tmp_path, gradient_accumulation_steps=2))
    assert 0.25 < curves[1][0] - curves[0][0] < 0.6  # 0.3 times about 1, not times the two microbatches
