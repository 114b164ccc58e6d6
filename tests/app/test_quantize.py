"""`mixtral quantize`: the folder it writes, and what is left when it fails."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MixtralForCausalLM

import mixtral as python_mixtral
from binary import BINARY, DEMO, edit_config, environment, mixtral, ok, ok_json
from checkpoints import save_consolidated

IDS = torch.randint(3, 4096, (2, 30), generator=torch.Generator().manual_seed(1))


def quantize(model: Path, out: Path, dtype: str = "int4", **options) -> subprocess.CompletedProcess:
    return mixtral("quantize", model, out, "--dtype", dtype, **options)


def load(folder: Path, dtype: str = "auto") -> python_mixtral.Mixtral:
    return python_mixtral.Mixtral.from_pretrained(folder, dtype=dtype)


def assert_fails(run: subprocess.CompletedProcess, code: int, *words: str) -> None:
    message = run.stderr.decode()
    assert run.returncode == code and message.count("\n") == 1, message
    for word in words:
        assert word in message


@pytest.fixture(scope="module", params=["int8", "fp8", "int4"])
def quantized(request, tmp_path_factory) -> Path:
    """The demo model quantised; the name of the folder is the dtype."""
    out = tmp_path_factory.mktemp("quantized") / "new" / request.param
    ok("quantize", DEMO, out, "--dtype", request.param)
    return out


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A quantised demo model, to be damaged."""
    ok("quantize", DEMO, tmp_path / "damaged", "--dtype", "int4")
    return tmp_path / "damaged"


# ---- what is written -------------------------------------------------------------------------------------------------


def test_loads_as_the_same_bits_as_quantising_while_loading(quantized):
    stored, expected = load(quantized), load(DEMO, quantized.name)
    assert stored.weight_type == load(quantized, quantized.name).weight_type == quantized.name
    ours, theirs = stored.named_parameters(), expected.named_parameters()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight), name
    assert torch.equal(stored(IDS), expected(IDS))
    assert stored.generate("Once", max_tokens=8)[0].text == expected.generate("Once", max_tokens=8)[0].text


def test_folder_holds_config_weights_and_the_small_files(quantized):
    files = {path.name for path in quantized.iterdir()}
    assert files == {path.name for path in DEMO.iterdir()}
    for name in files - {"config.json", "model.safetensors"}:
        assert (quantized / name).read_bytes() == (DEMO / name).read_bytes()
    assert not quantized.with_name(quantized.name + ".incomplete").exists()
    # As documented: every parameter under its own name, readable with any safetensors library.
    tensors = load_file(quantized / "model.safetensors")
    for name, weight in load(quantized).named_parameters().items():
        assert torch.equal(tensors.pop(name), weight), name
    assert not tensors


FIELDS = [name for name, member in vars(python_mixtral.Config).items() if isinstance(member, property)]


def assert_same_config(ours: python_mixtral.Config, source: python_mixtral.Config, dtype: str) -> None:
    changed = {"quantization": dtype, "dtype": "bfloat16", "window_source": "config.json: sliding_window"}
    for name in FIELDS:
        assert getattr(ours, name) == changed.get(name, getattr(source, name)), name


def test_config_keeps_every_field(quantized):
    assert_same_config(
        python_mixtral.Config.from_folder(quantized), python_mixtral.Config.from_folder(DEMO), quantized.name
    )
    theirs, source = AutoConfig.from_pretrained(quantized), AutoConfig.from_pretrained(DEMO)
    for name in ("hidden_size", "num_local_experts", "sliding_window", "rope_parameters", "head_dim", "eos_token_id"):
        assert getattr(theirs, name) == getattr(source, name), name


def test_consolidated_source_gives_the_same_weights(quantized, tmp_path):
    model = MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    (tmp_path / "source").mkdir()
    save_consolidated(model, tmp_path / "source")
    shutil.copy(DEMO / "tokenizer.model", tmp_path / "source" / "tokenizer.model.v1")
    ok("quantize", tmp_path / "source", tmp_path / "out", "--dtype", quantized.name)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (quantized / weights).read_bytes()
    ours = python_mixtral.Config.from_folder(tmp_path / "out")
    assert_same_config(ours, python_mixtral.Config.from_folder(tmp_path / "source"), quantized.name)
    assert (tmp_path / "out" / "tokenizer.model.v1").exists()


def test_unusual_architecture_survives(tmp_path):
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    unusual = {"norm_topk_prob": False, "router_dtype": "model", "sliding_window": None, "eos_token_id": [2, 7]}
    edit_config(model, num_experts_per_tok=1, rms_norm_eps=1 / 3, rope_theta=12345.675, **unusual)
    ok("quantize", model, tmp_path / "out", "--dtype", "int8")
    assert torch.equal(load(tmp_path / "out")(IDS), load(model, "int8")(IDS))


def test_an_empty_folder_or_a_killed_run_is_no_obstacle(quantized, tmp_path):
    out, incomplete = tmp_path / "out", tmp_path / "out.incomplete"
    out.mkdir()
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"half")
    (incomplete / "old").write_bytes(b"")
    ok("quantize", DEMO, f"{out}/", "--dtype", quantized.name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(os.listdir(out)) == sorted(os.listdir(quantized))


def test_every_command_runs_on_it(quantized, tmp_path):
    (tmp_path / "text").write_text("And it came to pass in those days")
    info = ok_json("info", quantized)
    assert info["dtype"] == info["checkpoint_dtype"] == quantized.name
    assert info["memory"]["weights_bytes"] == info["memory"]["weights_bytes_by_dtype"][quantized.name]
    size = (quantized / "model.safetensors").stat().st_size
    assert info["memory"]["weights_bytes"] == pytest.approx(size, rel=0.03)
    assert ok_json("bench", quantized, "--prompt-tokens", "8", "--new-tokens", "2")["dtype"] == quantized.name
    arguments = ["-p", "Once upon", "-n", "8"]
    assert ok("generate", quantized, *arguments) == ok("generate", DEMO, "--dtype", quantized.name, *arguments)
    scores = ok_json("perplexity", quantized, tmp_path / "text")
    at_load = ok_json("perplexity", DEMO, tmp_path / "text", "--dtype", quantized.name)
    assert scores["nats_per_token"] == at_load["nats_per_token"] and scores["dtype"] == quantized.name


# ---- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "MODEL"),
        (["one", "--dtype", "int4"], "OUT"),
        (["one", "two"], "--dtype"),
        (["one", "two", "--dtype", "float8"], "float8"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, word):
    assert_fails(mixtral("quantize", *arguments), 2, word)


def test_a_folder_in_use_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "kept").write_text("kept")
    for out in (tmp_path, tmp_path / "kept", DEMO):
        run = quantize(tmp_path / "no model", out)
        assert_fails(run, 2, str(out), "must not exist or be an empty folder")
    assert (tmp_path / "kept").read_text() == "kept"
    assert os.listdir(tmp_path) == ["kept"]


def test_a_place_that_cannot_be_written_exits_with_5(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("/proc/nowhere/out", tmp_path / "file" / "out"):
        assert_fails(quantize(DEMO, out), 5, "cannot be written", str(out))


@pytest.mark.parametrize("kibibytes", [0, 300, 1024], ids=["config", "tokenizer", "weights"])
def test_a_full_disk_leaves_nothing_behind(kibibytes, tmp_path):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes << 10, kibibytes << 10))

    run = quantize(DEMO, tmp_path / "out", preexec_fn=limit)
    assert_fails(run, 5, "out", "cannot be written", "File too large")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory) -> Path:
    """The demo model with a large file that is copied, before the weights are written, because of its name."""
    model = tmp_path_factory.mktemp("slow") / "model"
    shutil.copytree(DEMO, model)
    with open(model / "tokenizer.large", "wb") as file:
        file.truncate(2**25)  # milliseconds to catch, and far below the grace after a signal
    return model


def stopped_while_writing(model: Path, out: Path) -> subprocess.Popen:
    """A run that is stopped (SIGSTOP) in the middle of its files."""
    incomplete = out.with_name(out.name + ".incomplete")
    for _ in range(20):
        command = [BINARY, "quantize", model, out, "--dtype", "int4"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment())
        while process.poll() is None and not incomplete.exists():
            pass
        if process.returncode is None:
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it goes on until it is stopped
            if incomplete.exists() and not (incomplete / "model.safetensors").exists():
                return process
        process.kill()
        process.communicate()
        shutil.rmtree(out, ignore_errors=True)
    raise AssertionError("writing is too fast to be caught")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing_leaves_nothing_behind(number, code, slow_model, tmp_path):
    process = stopped_while_writing(slow_model, tmp_path / "out")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == code
    assert process.stderr.read().count(b"\n") == 1
    assert not list(tmp_path.iterdir())


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


QKV = "layers.0.attention.qkv_proj"


def damage(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        (QKV, torch.zeros(1, 10, 6, 544, dtype=torch.int8), "dtype must be U8, got I8"),
        (QKV, torch.zeros(1, 10, 6, 544).to(torch.float8_e4m3fn), "dtype must be U8, got F8_E4M3"),
        (QKV, torch.zeros(1, 10, 5, 544, dtype=torch.uint8), r"shape must be \[1, 10, 6, 544\], got \[1, 10, 5, 544\]"),
        (QKV, torch.zeros(320, 192, dtype=torch.bfloat16), "dtype must be U8, got BF16"),
        ("embed_tokens", torch.zeros(4096, 192, dtype=torch.uint8), "dtype must be F32, BF16 or F16, got U8"),
        (QKV, None, "tensor is missing"),
        ("norm", None, "tensor is missing"),
    ],
    ids=["I8", "F8_E4M3", "shape", "not packed", "packed", "missing matrix", "missing norm"],
)
def test_damaged_weights_are_load_errors(name, tensor, reason, damaged):
    damage(damaged, name, tensor)
    with pytest.raises(python_mixtral.LoadError, match=reason) as error:
        load(damaged)
    assert error.value.item == name
    assert_fails(mixtral("generate", damaged, "-p", "a", "-n", "2"), 3, name)


def test_a_tensor_too_many_is_a_load_error(damaged):
    tensors = load_file(damaged / "model.safetensors")
    save_file({**tensors, "layers.4.attention.qkv_proj": tensors[QKV].clone()}, damaged / "model.safetensors")
    with pytest.raises(python_mixtral.LoadError, match="is not part of the model"):
        load(damaged)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "mixtral", "dtype": "int3"},
        {"dtype": "int4"},
        {"quant_method": "bitsandbytes", "dtype": "int4"},
    ],
    ids=json.dumps,
)
def test_other_quantisations_are_load_errors(quantization, damaged):
    edit_config(damaged, quantization_config=quantization)
    with pytest.raises(python_mixtral.LoadError, match="is not supported|must have dtype") as error:
        load(damaged)
    assert error.value.item == "quantization_config"
    assert_fails(mixtral("info", damaged), 3, "quantization_config")


def test_sizes_that_cannot_be_quantised_are_a_load_error(damaged):
    edit_config(damaged, intermediate_size=200)
    with pytest.raises(python_mixtral.LoadError, match="multiples of 32, got intermediate_size 200") as error:
        load(damaged)
    assert error.value.item == "quantization_config"
    assert_fails(mixtral("info", damaged), 3, "quantization_config", "intermediate_size 200")


@pytest.mark.parametrize(("dtype", "name"), [("int8", "I8"), ("fp8", "F8_E4M3")])
def test_weights_of_the_other_kind_are_a_load_error(dtype, name, damaged):
    edit_config(damaged, quantization_config={"quant_method": "mixtral", "dtype": dtype})
    with pytest.raises(python_mixtral.LoadError, match=f"dtype must be {name}, got U8"):
        load(damaged)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_a_quantised_checkpoint_has_one_dtype(dtype, damaged):
    message = f"dtype must be auto or int4 for a checkpoint quantised to int4, got {dtype}"
    with pytest.raises(ValueError, match=message):
        load(damaged, dtype)
    assert_fails(mixtral("generate", damaged, "-p", "a", "--dtype", dtype), 2, message)
    assert_fails(quantize(damaged, damaged.with_name("other"), "int8"), 2, "checkpoint quantised to int4")
