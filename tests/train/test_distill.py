"""`mixtral distill`: how a student begins, what it learns, the share of the gain that it keeps, and clear errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixtral
from grown_models import small_model, write_texts
from mixtral.train import Batch, Mixtral, StepTotals, checkpoint, cross_entropy, distill_cross_entropy
from mixtral.train import distill as command
from mixtral.train.distill import share_kept
from mixtral.train.model import linear_cross_entropy
from mixtral.train.student import distill_loss

QUICK = ["--steps", "3", "--lr", "5e-3", "--tokens-per-step", "256", "--context", "64", "-t", "1"]
CONFIG = """\
[model]
hidden_size = 32
intermediate_size = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
num_experts = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, dense/, small.toml and text.jsonl."""
    folder = tmp_path_factory.mktemp("distill")
    small_model(folder / "teacher", seed=1)
    small_model(folder / "dense", experts=0, seed=2)
    (folder / "small.toml").write_text(CONFIG)
    write_texts(folder / "text.jsonl")
    return folder


def distill(folder: Path, out: Path, *flags: str, into: str = "dense") -> int:
    arguments = [str(folder / "teacher"), "--into", str(folder / into), str(out), "--data", str(folder / "text.jsonl")]
    return command.main([*arguments, *QUICK, *flags])


def before_training(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the student's first checkpoint."""
    tensors, state = checkpoint.load(checkpoint.paths(out)[0])
    assert state["step"] == 0
    return {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name.startswith("weight.")}


@pytest.mark.parametrize("into", ["dense", "small.toml"])
def test_a_student_begins_as_its_teacher_outside_of_the_feed_forward_blocks(
    into: str, folder: Path, tmp_path: Path
) -> None:
    assert distill(folder, tmp_path / "out", into=into) == 0
    student, teacher = before_training(tmp_path / "out"), load_file(folder / "teacher" / "model.safetensors")
    inside = [name for name in student if ".mlp." in name]
    assert len(inside) == 2 * 3
    for name in set(student) - set(inside):
        assert torch.equal(student[name], teacher[name]), name
    if into == "dense":
        dense = load_file(folder / "dense" / "model.safetensors")
        assert all(torch.equal(student[name], dense[name]) for name in inside)
    else:
        assert student["model.layers.0.mlp.gate_proj.weight"].shape == (16, 32)
    saved = mixtral.Mixtral.from_pretrained(tmp_path / "out")
    assert not saved.config.is_moe and saved.config.vocab_size == 4096
    assert saved.generate("The king", max_tokens=3)[0].token_ids, "the teacher's tokenizer goes with it"


def test_the_student_may_keep_its_own_weights(folder: Path, tmp_path: Path) -> None:
    assert distill(folder, tmp_path / "out", "--init", "student") == 0
    dense = load_file(folder / "dense" / "model.safetensors")
    assert all(torch.equal(tensor, dense[name]) for name, tensor in before_training(tmp_path / "out").items())


@pytest.mark.parametrize("student", ["dense", "teacher"])
def test_the_loss_is_three_quarters_of_the_text_and_one_of_the_teacher(student: str, folder: Path, monkeypatch) -> None:
    """Against the logits of both models in plain PyTorch; a sparse student has the terms of its routers besides."""
    teacher = Mixtral.from_pretrained(folder / "teacher").eval().requires_grad_(False)
    model = Mixtral.from_pretrained(folder / student)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    batch = Batch.from_documents([list(range(3, 30)), list(range(40, 50))], [[True] * 27, [False] * 5 + [True] * 5])
    totals = StepTotals(targets=2 * batch.targets, tokens=2 * batch.tokens)  # of two such microbatches
    products, make = [], cross_entropy._logits
    monkeypatch.setattr(cross_entropy, "_logits", lambda *of: products.append(len(of[0])) or make(*of))
    losses, extra = distill_loss(teacher, 0.25, 2.0)(model, batch, totals)
    assert sum(products) == batch.targets  # one product of the vocabulary, besides the teacher's
    monkeypatch.undo()

    with torch.no_grad():
        logits, theirs = (m.logits(batch)[batch.labels >= 0] for m in (model, teacher))
    labels = batch.labels[batch.labels >= 0]
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    soft = -4 * ((theirs / 2).softmax(-1) * (logits / 2).log_softmax(-1)).sum()
    assert float(losses.cross_entropy) == pytest.approx(float(hard / totals.targets), rel=1e-5)
    assert extra["distill"].item() == pytest.approx(float((0.75 * hard + 0.25 * soft) / totals.targets), rel=1e-5)
    router = 0.01 * losses.balance + 0.001 * losses.z
    assert losses.total.item() == pytest.approx((extra["distill"] + router).item(), rel=1e-5)
    assert (router.item() > 0) == (student == "teacher")

    model.zero_grad()
    losses.total.backward()
    got = model.lm_head.weight.grad
    hidden = model._hidden_states(batch)[0].detach()
    weight = model.lm_head.weight.detach().requires_grad_()
    expected = distill_cross_entropy((hidden @ weight.T), teacher.logits(batch), batch.labels, None, 0.25, 2.0)
    (expected / totals.targets).backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_share_of_the_gain_with_a_baseline_of_its_own(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert distill(folder, out, "--baseline", "train") == 0
    report = json.loads((out / "distill.json").read_text())
    losses = report["nats_per_token"]
    assert set(losses) == {"teacher", "untrained", "baseline", "student"}
    assert report["share_of_gain_kept"] == share_kept(losses)
    printed = capsys.readouterr().out
    assert f"student {losses['student']:.4f}" in printed
    assert printed.removeprefix(f"{out}: ") == (out / "README.md").read_text().removeprefix("# out\n\n")
    # The baseline begins with its own weights and sees the same text without a teacher.
    dense = load_file(folder / "dense" / "model.safetensors")
    assert all(torch.equal(tensor, dense[name]) for name, tensor in before_training(out / "baseline").items())
    rows = [json.loads(line) for line in (out / "baseline" / "metrics.jsonl").read_text().splitlines()]
    assert "distill" not in rows[0] and rows[0]["loss"] == rows[0]["cross_entropy"]
    mixed = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert mixed["loss"] == mixed["distill"] != mixed["cross_entropy"]
    # The reported loss is that of the saved student.
    model = Mixtral.from_pretrained(out).eval()
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    tokenizer = mixtral.Tokenizer(out)
    chosen = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in (texts[19], texts[39])]  # every 20th
    batch = Batch.from_documents(chosen)
    with torch.no_grad():
        hidden = model._hidden_states(batch)[0]
        nats = linear_cross_entropy(hidden, model.lm_head.weight, batch.labels) / batch.tokens
    assert losses["student"] == pytest.approx(float(nats), rel=1e-5)


def test_the_share_by_hand() -> None:
    """Switch Transformers, table 6: (S - D) / (T - D)."""
    assert share_kept({"teacher": 1.5, "baseline": 2.5, "student": 2.2}) == pytest.approx(0.3)
    assert share_kept({"teacher": 2.0, "baseline": 2.0, "student": 1.9}) is None


def test_a_resumed_run_has_the_bits_of_a_whole_one(folder: Path, tmp_path: Path, capsys) -> None:
    flags = ["--checkpoint-every", "1", "--baseline", "train"]
    assert distill(folder, tmp_path / "whole", *flags) == 0
    part = Path(shutil.copytree(tmp_path / "whole", tmp_path / "part"))
    (part / "config.json").unlink()
    checkpoint.paths(part)[-1].unlink()
    assert distill(folder, part, *flags, "--resume") == 0
    one, other = (load_file(out / "model.safetensors") for out in (tmp_path / "whole", part))
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [json.loads((out / "distill.json").read_text()) for out in (tmp_path / "whole", part)]
    assert reports[0]["nats_per_token"] == reports[1]["nats_per_token"]
    capsys.readouterr()
    assert distill(folder, part, *flags, "--resume", "--alpha", "0.5") == 2
    assert "alpha was 0.25 and is 0.5" in capsys.readouterr().err


WRONG = [
    (["--alpha", "2"], 2, "--alpha must be in [0, 1], got 2.0"),
    (["--temperature", "0"], 2, "--temperature must be more than 0, got 0.0"),
    (["--baseline", "trained"], 2, "--baseline must be a number or train, got trained"),
    (["--held-out-share", "0"], 2, "no text is held out"),
    (["--context", "4096"], 2, "--context 4096 exceeds max_position 128 of the model"),
    (["--into", "narrow.toml"], 2, "give the student the teacher's sizes and 2 layers, or take --init student"),
    (["--into", "deep.toml"], 2, "give the student the teacher's sizes and 2 layers, or take --init student"),
    (["--into", "vocabulary.toml"], 2, "the vocabularies must be the same: 5000 tokens in the student"),
    (["--into", "from.toml"], 2, "model.from: give that folder to --into"),
    (["--into", "typo.toml"], 2, "unknown key model.hidden_sise; did you mean hidden_size?"),
    (["--into", "none"], 3, "none"),
    (["--data", "none.jsonl"], 2, "no file matches"),
]


@pytest.mark.parametrize("flags, status, message", WRONG, ids=[" ".join(flags) for flags, _, _ in WRONG])
def test_what_is_wrong_is_one_line(flags: list[str], status: int, message: str, folder: Path, tmp_path: Path, capsys):
    (tmp_path / "narrow.toml").write_text(CONFIG.replace("hidden_size = 32", "hidden_size = 64"))
    (tmp_path / "deep.toml").write_text(CONFIG.replace("num_layers = 2", "num_layers = 3"))
    (tmp_path / "vocabulary.toml").write_text(CONFIG + "vocab_size = 5000\n")
    (tmp_path / "from.toml").write_text('[model]\nfrom = "dense"\n')
    (tmp_path / "typo.toml").write_text(CONFIG.replace("hidden_size", "hidden_sise"))
    flags = [str(tmp_path / flag) if flag.endswith((".toml", ".jsonl")) else flag for flag in flags]
    assert distill(folder, tmp_path / "out", *flags) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
