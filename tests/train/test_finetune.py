"""`mixtral finetune`: adapters that every reader understands, what is frozen, exact resume, and clear errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixtral
from binary import DEMO
from grown_models import small_model, write_chats
from mixtral.train import checkpoint
from mixtral.train import finetune as command
from mixtral.train.conversations import Document
from mixtral.train.example_batches import ExampleBatches, ExampleLoss, pack

IDS = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(3))
QUICK = ["--steps", "4", "--lr", "0.02", "--tokens-per-step", "128", "--lora", "4", "--alpha", "8", "-t", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sparse/, dense/ and chat.jsonl."""
    folder = tmp_path_factory.mktemp("models")
    small_model(folder / "sparse")
    small_model(folder / "dense", experts=0)
    write_chats(folder / "chat.jsonl")
    return folder


def finetune(models: Path, out: Path, *flags: str, model: str = "sparse") -> dict:
    arguments = [str(models / model), str(out), "--data", str(models / "chat.jsonl"), *QUICK, *flags]
    assert command.main(arguments) == 0
    return json.loads((out / "finetune.json").read_text())


def logits(folder: Path, **options: object) -> torch.Tensor:
    return mixtral.Mixtral.from_pretrained(folder, dtype="float32", **options)(IDS)


def logits_of_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(IDS).logits


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    "model, flags",
    [
        ("sparse", []),
        ("sparse", ["--targets", "attention"]),
        ("sparse", ["--targets", "experts", "--train-router", "yes"]),
        ("dense", []),
    ],
    ids=["all", "attention", "experts and router", "dense"],
)
def test_all_readers_see_the_same_adapter(model: str, flags: list[str], models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(models, out, "--merge", *flags, model=model)
    base = models / model
    with_adapter = logits(base, lora=out)
    assert (with_adapter - logits(base)).abs().max() > 0.01 * with_adapter.abs().max(), "the adapter changes nothing"
    assert_same(logits_of_peft(base, out), with_adapter)
    assert_same(logits(out / "merged"), with_adapter)
    prompts = [[1, 20, 30], [1, 500]]
    generated = [
        [result.token_ids for result in mixtral.Mixtral.from_pretrained(folder, **options).generate(prompts, 12)]
        for folder, options in ((base, {"lora": out}), (out / "merged", {}))
    ]
    assert generated[0] == generated[1]


def test_the_file_holds_what_was_trained_and_no_more(models: Path, tmp_path: Path) -> None:
    report = finetune(models, tmp_path / "out")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == report["trained_parameters"]
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert not any(".gate." in name for name in adapter), "the router is frozen unless asked"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / "sparse")
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8.0, "CAUSAL_LM")
    finetune(models, tmp_path / "router", "--train-router", "yes")
    with_router = load_file(tmp_path / "router" / "adapter_model.safetensors")
    assert sorted(set(with_router) - set(adapter)) == [
        f"base_model.model.model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)
    ]


def test_without_adapters_the_model_is_trained_and_its_routers_are_not(models: Path, tmp_path: Path) -> None:
    finetune(models, tmp_path / "out", "--lora", "0")
    old, new = load_file(models / "sparse" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(old) == set(new)
    frozen = {name for name in old if torch.equal(old[name], new[name])}
    assert frozen == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "metrics.jsonl").read_text().startswith('{"step": 1,')
    logits(tmp_path / "out")
    finetune(models, tmp_path / "router", "--lora", "0", "--train-router", "yes")
    new = load_file(tmp_path / "router" / "model.safetensors")
    assert not any(torch.equal(old[name], new[name]) for name in old)


def test_the_bundled_model_learns(tmp_path: Path) -> None:
    """Twelve conversations lower the loss on others of their kind."""
    data = write_chats(tmp_path / "chat.jsonl", 16)
    flags = ["--steps", "8", "--lr", "2e-3", "--tokens-per-step", "160", "--held-out-every", "4", "--lora", "8"]
    assert command.main([str(DEMO), str(tmp_path / "out"), "--data", str(data), *flags]) == 0
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert report["after"]["cross_entropy"] < report["before"]["cross_entropy"] - 0.5
    assert report["before"]["targets"] == report["after"]["targets"] > 20
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["evaluation"]["held_out"] == report["after"]


def test_a_resumed_run_has_the_bits_of_a_whole_one(models: Path, tmp_path: Path, capsys) -> None:
    flags = ["--checkpoint-every", "2", "--train-router", "yes"]
    whole = finetune(models, tmp_path / "whole", *flags)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for name in ("adapter_model.safetensors", "adapter_config.json", "finetune.json"):
        (part / name).unlink()
    last = checkpoint.paths(part)[-1]
    assert last.name == "step-00000004.safetensors"
    last.unlink()
    resumed = finetune(models, part, *flags, "--resume")
    one, other = (load_file(out / "adapter_model.safetensors") for out in (tmp_path / "whole", part))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed["before"] == whole["before"] and resumed["after"] == whole["after"]

    other_data = write_chats(tmp_path / "other.jsonl", seed=1)
    arguments = [str(models / "sparse"), str(part), *QUICK, *flags, "--resume"]
    assert command.main([*arguments, "--data", str(other_data)]) == 2
    assert "is of another run: data was" in capsys.readouterr().err
    assert command.main([*arguments, "--data", str(models / "chat.jsonl"), "--alpha", "9"]) == 2
    assert "alpha was 8.0 and is 9.0" in capsys.readouterr().err


WRONG = [
    (["--lora", "-1"], 2, "--lora must be at least 0, got -1"),
    (["--targets", "attention,mlp"], 2, "targets must be some of attention, experts, got mlp"),
    (["--targets", ""], 2, "targets must be some of attention, experts, got none"),
    (["--lora", "0", "--merge"], 2, "--merge: with --lora 0 there is no adapter to merge"),
    (["--held-out-every", "1"], 2, "--held-out-every must be 0 or at least 2, got 1"),
    (["--context", "4096"], 2, "--context 4096 exceeds max_position 128 of the model"),
    (["--steps", "0"], 2, "needs exactly one of steps"),
    (["--tokens-per-step", "16"], 2, "tokens_per_step must be at least"),
    (["--chat-template", "nonsense"], 2, "nonsense"),
    (["--resume"], 2, "holds no checkpoint to resume from"),
    (["--train-router", "maybe"], 2, "invalid choice: 'maybe'"),
]


@pytest.mark.parametrize("flags, status, message", WRONG, ids=[" ".join(flags) for flags, _, _ in WRONG])
def test_a_wrong_flag_is_one_line(flags: list[str], status: int, message: str, models: Path, tmp_path: Path, capsys):
    arguments = [str(models / "sparse"), str(tmp_path / "out"), "--data", str(models / "chat.jsonl"), *QUICK, *flags]
    if flags[0] == "--tokens-per-step":
        arguments += ["--context", "128"]
    assert command.main(arguments) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_a_wrong_file_is_one_line(models: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    base = [str(models / "sparse"), str(tmp_path / "out"), *QUICK]
    assert command.main([*base, "--data", str(bad)]) == 2
    assert f"{bad}:1: messages must be a list, and not empty" in capsys.readouterr().err
    new = [str(models / "sparse"), str(tmp_path / "new"), *QUICK]
    assert command.main([*new, "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err and not (tmp_path / "new").exists()
    chats = ["--data", str(models / "chat.jsonl")]
    assert command.main([str(tmp_path / "none"), str(tmp_path / "out"), *QUICK, *chats]) == 3
    assert command.main([str(models / "sparse"), str(models / "dense"), *QUICK, *chats]) == 2
    assert "is in use" in capsys.readouterr().err
    dense = [str(models / "dense"), str(tmp_path / "dense"), *QUICK, *chats, "--train-router", "yes"]
    assert command.main(dense) == 2
    assert "a dense model has no router to train" in capsys.readouterr().err


# --- batches ----------------------------------------------------------------------------------------------------------


def documents(count: int) -> list[Document]:
    """Document i is [i, i, ...], of 3 to 7 tokens; its last two tokens are scored."""
    return [Document([i] * (3 + i % 5), [False] * (1 + i % 5) + [True, True]) for i in range(count)]


def test_each_epoch_has_every_document_once_and_a_step_is_a_function_of_its_number() -> None:
    examples = documents(20)
    tokens = sum(len(document.ids) for document in examples)
    batches = ExampleBatches(examples, 25, 1, seed=5)
    steps = 3 * tokens // 25  # whole steps of three epochs; the epochs' borders lie anywhere in them
    row = [document.ids[0] for step in range(steps) for document in batches.of_step(step)]
    for epoch in range(2):
        assert sorted(row[20 * epoch : 20 * (epoch + 1)]) == list(range(20))
    assert row[:20] != row[20:40]
    again = ExampleBatches(examples, 25, 1, seed=5)
    assert [d.ids for d in again.of_step(7)] == [d.ids for d in batches.of_step(7)]
    assert all(batches.of_step(step) for step in range(steps))
    other = ExampleBatches(examples, 25, 1, seed=6)
    assert [d.ids[0] for step in range(steps) for d in other.of_step(step)] != row


def test_microbatches_hold_whole_documents_and_score_what_is_marked() -> None:
    batches = ExampleBatches(documents(20), 40, 3, seed=0)
    parts = batches(2, 0)
    assert len(parts) == 3
    whole = sorted(tuple(document.ids) for document in batches.of_step(2))
    rows = [ids for part in parts for ids in part.input_ids.split(part.cu_seqlens.diff().tolist())]
    assert sorted((*row.tolist(), int(row[0])) for row in rows) == whole
    batch = pack(documents(2))  # [0, 0, 0] and [1, 1, 1, 1], the last two of each scored
    assert batch.labels.tolist() == [0, 0, -100, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_the_held_out_loss_is_a_mean_over_scored_tokens(models: Path) -> None:
    model = mixtral.train.Mixtral.from_pretrained(models / "sparse").eval()
    chosen = documents(9)
    apart, together = (ExampleLoss(chosen, tokens, "cpu")(model)["held_out"] for tokens in (7, 1000))
    nats = 0.0
    for document in chosen:
        with torch.no_grad():
            row = model(torch.tensor([document.ids]))[0].log_softmax(-1)
        nats -= sum(float(row[len(document.ids) - n - 1, document.ids[0]]) for n in (1, 2))
    assert apart["targets"] == together["targets"] == 18
    assert apart["cross_entropy"] == pytest.approx(nats / 18, rel=1e-5)
    assert together["cross_entropy"] == pytest.approx(nats / 18, rel=1e-5)
    assert ExampleLoss([], 10, "cpu")(model) == {}
