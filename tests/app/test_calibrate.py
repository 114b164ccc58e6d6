"""`mixtral quantize --calibrate`: better roundings in the same format, and what is said of a text that does not do."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import mixtral as python_mixtral
from binary import BINARY, DEMO, ROOT, environment, mixtral, ok, ok_json
from checkpoints import random_model

TEXT = ROOT / "tests" / "data" / "held_out" / "bible.txt"
EXPERTS = 8


def calibrate(out: Path, text: Path, model: Path = DEMO) -> dict[str, torch.Tensor]:
    """The parameters of ``model`` in int4, calibrated on ``text``."""
    ok("quantize", model, out, "--dtype", "int4", "--calibrate", text)
    return parameters(out)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return python_mixtral.Mixtral.from_pretrained(folder, dtype="int4").named_parameters()


@pytest.fixture(scope="module")
def nearest() -> dict[str, torch.Tensor]:
    return parameters(DEMO)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "int4"
    calibrate(out, TEXT)
    return out


def nats(model: Path, *arguments: str) -> float:
    return ok_json("perplexity", model, TEXT, *arguments)["nats_per_token"]


def test_predicts_the_text_better_than_the_nearest(calibrated):
    exact = nats(DEMO)
    assert abs(nats(calibrated) - exact) < 0.7 * abs(nats(DEMO, "--dtype", "int4") - exact)


def test_changes_every_quantised_matrix_and_nothing_else(calibrated, nearest):
    ours = parameters(calibrated)
    assert ours.keys() == nearest.keys()
    for name, weight in nearest.items():
        assert ours[name].shape == weight.shape and ours[name].dtype == weight.dtype
        assert torch.equal(ours[name], weight) != (weight.dtype == torch.uint8), name
    assert (calibrated / "config.json").read_bytes().count(b'"int4"') == 1


def test_same_text_same_bits(calibrated, tmp_path):
    calibrate(tmp_path / "again", TEXT)
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (calibrated / weights).read_bytes()


def test_experts_without_tokens_keep_the_nearest(nearest, tmp_path):
    (tmp_path / "text").write_text("a")  # with BOS two tokens, of two experts each
    ours = calibrate(tmp_path / "out", tmp_path / "text")
    for layer in range(4):
        for matrix in ("gate_up_proj", "down_proj"):
            name = f"layers.{layer}.moe.{matrix}"
            changed = [not torch.equal(ours[name][e], nearest[name][e]) for e in range(EXPERTS)]
            assert 2 <= sum(changed) <= 4, name


def test_dense_model_with_tied_embeddings(tmp_path):
    model = random_model(dense=True, vocab_size=4096, intermediate_size=96, head_dim=32, tie_word_embeddings=True)
    model.bfloat16().save_pretrained(tmp_path / "model")
    shutil.copy(DEMO / "tokenizer.model", tmp_path / "model")
    ours, nearest = calibrate(tmp_path / "out", TEXT, tmp_path / "model"), parameters(tmp_path / "model")
    changed = {name for name in nearest if not torch.equal(ours[name], nearest[name])}
    assert changed == {name for name in nearest if "_proj" in name}


# ---- what fails ------------------------------------------------------------------------------------------------------


def assert_refused(out: Path, message: str, *arguments: str | Path) -> None:
    run = mixtral("quantize", *arguments)
    assert run.returncode == 2 and message in run.stderr.decode() and run.stderr.count(b"\n") == 1, run.stderr
    assert not out.exists() and not out.with_name(out.name + ".incomplete").exists()


def test_a_text_that_cannot_be_read_or_is_empty_is_refused(tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.write_text("")
    for text, message in (
        (tmp_path / "missing", f"cannot open {tmp_path / 'missing'}: No such file"),
        (tmp_path, f"cannot read {tmp_path}: Is a directory"),
        (empty, f"--calibrate FILE must not be empty, got {empty}"),
    ):
        assert_refused(out, message, DEMO, out, "--dtype", "int4", "--calibrate", text)


def test_only_int4_of_plain_weights(calibrated, tmp_path):
    out = tmp_path / "out"
    message = "--calibrate needs --dtype int4, got int8"
    assert_refused(out, message, DEMO, out, "--dtype", "int8", "--calibrate", TEXT)
    message = "--calibrate needs a checkpoint that is not quantised, got int4"
    assert_refused(out, message, calibrated, out, "--dtype", "int4", "--calibrate", TEXT)


def test_a_signal_while_calibrating_leaves_nothing_behind(tmp_path):
    (tmp_path / "text").write_text(TEXT.read_text() * 100)
    command = [BINARY, "quantize", DEMO, tmp_path / "out", "--dtype", "int4", "--calibrate", tmp_path / "text"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment())
    time.sleep(1)  # it takes some twenty seconds
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
