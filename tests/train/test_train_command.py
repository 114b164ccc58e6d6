"""`mixtral train` from end to end."""

import json
import lzma
import math
import signal
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral.train import Mixtral, checkpoint, metrics
from mixtral.train.command import main
from tiny_run import assert_same_run, mixtral_train, tensors_of

pytest_plugins = ["training_fixtures"]

# Code that runs before the command: the checkpoint of step 8 is cut off by SIGKILL, half written.
KILL_IN_CHECKPOINT = """
import os, signal
from mixtral.train import checkpoint
save_file = checkpoint.save_file
def save_and_die(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if "step-00000008" in str(path):
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_and_die
"""


@pytest.fixture
def trained(corpus: Path) -> Path:
    """The output folder of a whole run."""
    assert main([str(corpus), "--set", "data.domains.a.weight=1"]) == 0
    return corpus.parent / "out"


def test_a_run_leaves_a_model_folder(trained: Path, corpus: Path) -> None:
    assert {p.name for p in trained.iterdir()} == {
        "README.md", "checkpoints", "config.json", "loss.png", "loss.svg", "metrics.jsonl", "model.safetensors",
        "tensorboard", "tokenizer.model", "tokenizer_config.json", "train.toml",
    }  # fmt: skip
    assert (trained / "model.safetensors").stat().st_mode == (trained / "metrics.jsonl").stat().st_mode
    model = mixtral.Mixtral.from_pretrained(trained)
    assert len(model.generate(["the king"], max_tokens=4)[0].token_ids) > 0
    again = Mixtral.from_pretrained(trained)
    for name, p in again.named_parameters():
        assert torch.equal(p, tensors_of(trained)[f"weight.{name}"]), name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(trained)("the king")["input_ids"][0] == 1
    theirs = AutoModelForCausalLM.from_pretrained(trained).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, again.eval()(ids), atol=1e-4, rtol=1e-4)
    card = (trained / "README.md").read_text()
    assert "| a | 36 |" in card and "| b | 2 |" in card and "8 steps" in card and " AdamW, peak learning rate" in card
    scores = metrics.read(trained)[-1]["evaluation"]
    for name, score in scores.items():
        assert f"| {name} | {score['bits_per_byte']:.3f} | {score['xz_bits_per_byte']:.3f} |" in card
    held_out = (corpus.parent / "held_out.txt").read_bytes()
    assert scores["b"]["bytes"] == len(held_out)
    assert scores["b"]["xz_bits_per_byte"] == 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)


def test_bits_per_byte_are_those_of_the_model(trained: Path, corpus: Path) -> None:
    """The held-out score of a document shorter than the context, from the logits of the inference model."""
    (corpus.parent / "held_out.txt").write_text("the king said unto him: go\n")
    assert main([str(corpus), "--out", str(corpus.parent / "short"), "--steps", "2"]) == 0
    model = mixtral.Mixtral.from_pretrained(corpus.parent / "short")
    ids = [1, *model.tokenizer.encode("the king said unto him: go\n"), 2]
    nats = torch.nn.functional.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="sum")
    score = metrics.read(corpus.parent / "short")[-1]["evaluation"]["b"]
    assert score["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) / 27, rel=1e-5)
    assert score["tokens"] == len(ids) - 1


def test_kill_in_mid_checkpoint_and_resume(corpus: Path) -> None:
    whole, killed = corpus.parent / "whole", corpus.parent / "killed"
    run = mixtral_train(corpus, "--out", killed, before=KILL_IN_CHECKPOINT)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [p.name for p in checkpoint.paths(killed)][-1] == "step-00000004.safetensors"
    assert list((killed / "checkpoints").glob(".*"))  # the half that was written
    run = mixtral_train(corpus, "--out", killed, "--resume")
    assert run.returncode == 0, run.stderr
    assert not list((killed / "checkpoints").glob(".*"))
    assert main([str(corpus), "--out", str(whole)]) == 0
    assert_same_run(whole, killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()


def train_on_two_ranks(corpus: Path, out: Path, *options: str) -> None:
    run = mixtral_train(corpus, "--out", out, *options, ranks=2, script=out.with_suffix(".py"))
    assert run.returncode == 0, run.stderr


def test_two_ranks_give_the_bits_of_two_microbatches(corpus: Path, tmp_path: Path) -> None:
    """A sum of two gradients does not depend on which process adds them, nor does any other number of a step."""
    train_on_two_ranks(corpus, tmp_path / "two")
    assert main([str(corpus), "--out", str(tmp_path / "one"), "--set", "train.accumulation=2"]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert (tmp_path / "one/train.toml").read_text().replace("/one", "/two") == (
        tmp_path / "two/train.toml"
    ).read_text()


def test_more_microbatches_than_ranks_differ_by_the_order_of_sums_alone(corpus: Path, tmp_path: Path) -> None:
    """One step: its gradients are in the first moments, and its weights move by at most the learning rate."""
    options = ["--set", "train.accumulation=4", "--set", "router.balance=global", "--steps", "1"]
    train_on_two_ranks(corpus, tmp_path / "two", *options)
    assert main([str(corpus), "--out", str(tmp_path / "one"), *options]) == 0
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    for name, tensor in one.items():
        if name.startswith("exp_avg."):
            assert (two[name] - tensor).norm() <= 1e-6 * tensor.norm() + 1e-9, name
    first, second = (metrics.read(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("loss", "cross_entropy", "balance", "z", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-6), name


def test_a_rank_may_have_nothing_to_do(corpus: Path, tmp_path: Path) -> None:
    """One document a step is one microbatch; the second rank adds nothing to any number."""
    options = ["--steps", "2", "--set", "train.tokens_per_step=8", "--set", "train.context=8"]
    options += ["--set", "router.balance=global", "--set", "data.domains.b.weight=1e-6"]
    train_on_two_ranks(corpus, tmp_path / "two", *options)
    assert main([str(corpus), "--out", str(tmp_path / "one"), "--set", "train.accumulation=2", *options]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_ranks_share_microbatches_evenly(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    run = mixtral_train(corpus, "--out", tmp_path / "out", "--set", "train.accumulation=3", ranks=2, script=script)
    assert run.returncode != 0
    assert "train.accumulation 3 is not a multiple of the 2 ranks, which share microbatches" in run.stderr


def test_another_run_is_not_resumed(trained: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*flags: str) -> str:
        assert main([str(corpus), "--resume", *flags]) == 2
        return capsys.readouterr().err

    assert "train.lr was 0.003 and is 0.001" in refused("--set", "train.lr=1e-3")
    assert "model.hidden_size was 32 and is 64" in refused("--set", "model.hidden_size=64")
    with open(corpus.parent / "b1.txt", "a") as file:
        file.write("more")
    assert "data was" in (error := refused()) and error.count("\n") == 1
    (corpus.parent / "b1.txt").unlink()
    demo = Path(__file__).parents[2] / "models" / "demo" / "tokenizer.model"
    assert "tokenizer was" in refused("--set", f"data.tokenizer={demo}")


def test_a_longer_run_goes_on(trained: Path, corpus: Path) -> None:
    assert main([str(corpus), "--resume", "--steps", "10"]) == 0
    assert [row["step"] for row in metrics.read(trained) if "loss" in row] == list(range(1, 11))


def test_training_continues_from_weights(trained: Path, corpus: Path) -> None:
    """Another run, from the weights of the first: its loss begins where that ended."""
    text = corpus.read_text()
    again = corpus.with_name("again.toml")
    again.write_text('[model]\nfrom = "out"\n' + text[text.index("[data]") :].replace('tokenizer = "tokenizer"\n', ""))
    assert main([str(again), "--out", str(corpus.parent / "more"), "--steps", "2"]) == 0
    last = [row["cross_entropy"] for row in metrics.read(trained) if "loss" in row]
    first = metrics.read(corpus.parent / "more")[0]["cross_entropy"]
    assert first < last[0] - 0.2


def test_a_vocabulary_that_does_not_fit(trained: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    text = corpus.read_text()
    again = corpus.with_name("again.toml")
    demo = Path(__file__).parents[2] / "models" / "demo"
    again.write_text('[model]\nfrom = "out"\n' + text[text.index("[data]") :].replace('"tokenizer"', f'"{demo}"'))
    assert main([str(again), "--out", str(corpus.parent / "more")]) == 2
    assert "vocabulary mismatch: the tokenizer has 4096 tokens, the model 320" in capsys.readouterr().err


def test_a_tokenizer_is_trained_when_asked(corpus: Path) -> None:
    corpus.write_text(corpus.read_text().replace('tokenizer = "tokenizer"', "train_tokenizer = { vocab_size = 310 }"))
    assert main([str(corpus), "--steps", "2"]) == 0
    out = corpus.parent / "out"
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 310
    assert mixtral.Tokenizer(out).vocab_size == 310


def test_ctrl_c_in_the_command(corpus: Path) -> None:
    before = """
import os, signal
from mixtral.train import loop
finish = loop._Loop._after_step
def interrupted(self, row):
    if self.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
    finish(self, row)
loop._Loop._after_step = interrupted
"""
    run = mixtral_train(corpus, before=before)
    assert run.returncode == 130
    assert run.stderr == "stopped after step 3, which is saved: --resume goes on\n"
    assert checkpoint.paths(corpus.parent / "out")[-1].name == "step-00000003.safetensors"
