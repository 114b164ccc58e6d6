"""`--gpu-memory`, with memory of the CPU in the place of a GPU's: its plan, its tokens and its counts."""

import json
import re
from pathlib import Path

import pytest
import torch

import mixtral as python_mixtral
from binary import DEMO, mixtral, ok, ok_json
from test_binary import MIXTRAL_8X7B

SIMULATED = ["--simulate-gpu", "--dtype", "int8"]
PROMPT = ["-p", "Once upon a time", "-n", "12", "--ignore-eos"]
SIZES = ["--prompt-tokens", "8", "--new-tokens", "3", "--repeat", "2", "--batch", "2"]
GIB = 1 << 30


def plan(model: Path, memory: object, *flags: object) -> dict:
    return ok_json("info", model, "--gpu-memory", str(memory), *flags)["offload"]


def refused(code: int, *arguments: object) -> str:
    run = mixtral(*arguments)
    assert (run.returncode, run.stdout) == (code, b"") and run.stderr.count(b"\n") == 1, run.stderr
    return run.stderr.decode()


@pytest.fixture(scope="module")
def everything() -> dict:
    """The plan of a device with room for all 32 experts of the bundled model."""
    return plan(DEMO, "1GiB", *SIMULATED)


def memory_for(experts: int, everything: dict) -> str:
    others = sum(everything[name] for name in ("fixed_bytes", "activations_bytes", "staging_bytes"))
    return str(others + experts * everything["expert_bytes"])


@pytest.fixture
def big_model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return tmp_path


# ---- what is planned is what happens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [0, 5, 16, 32])
def test_tokens_are_those_of_the_whole_model_and_all_choices_are_counted(experts, everything):
    flags = [*SIMULATED, "--gpu-memory", memory_for(experts, everything)]
    assert ok("generate", DEMO, *PROMPT, *flags) == ok("generate", DEMO, *PROMPT, "--dtype", "int8")
    counts, planned = ok_json("bench", DEMO, *SIZES, *flags)["expert_counts"], plan(DEMO, *flags[-1:], *SIMULATED)
    choices = planned["hits_per_token"] + planned["misses_per_token"]
    assert choices == 4 * 2  # layers and experts per token
    assert counts["hits"] + counts["misses"] == 2 * 2 * (8 + 3 - 1) * choices  # the last token is not read
    assert (counts["hits"] == 0, counts["misses"] == 0) == (experts == 0, experts == 32)
    assert (planned["hits_per_token"] == 0, planned["misses_per_token"] == 0) == (experts == 0, experts == 32)


def test_experts_are_planned_layer_by_layer(everything):
    assert everything["gpu_experts"] == 32 and everything["cpu_experts"] == everything["cpu_expert_bytes"] == 0
    some = plan(DEMO, memory_for(18, everything), *SIMULATED, "-c", "100")
    assert some["gpu_experts_by_layer"] == [5, 5, 4, 4]
    assert (some["gpu_experts"], some["cpu_experts"]) == (18, 14)
    assert some["gpu_expert_bytes"] == 18 * some["expert_bytes"]
    assert some["cpu_expert_bytes"] == 14 * some["expert_bytes"]
    assert some["cpu_bytes"] == 32 * some["expert_bytes"] + some["staging_bytes"]
    assert some["staging_bytes"] == 2 * some["expert_bytes"]
    assert (some["hits_per_token"], some["routing"]) == (8 * 18 / 32, "even")
    assert some["kv_bytes"] < everything["kv_bytes"] / 3
    one_less = plan(DEMO, int(memory_for(18, everything)) - 1, *SIMULATED)
    assert one_less["gpu_experts_by_layer"] == [5, 4, 4, 4]


def test_counts_of_a_text_forecast_its_hits(everything, tmp_path):
    """`bench` counts the choices of its own random prompt, so the counts say of it exactly what is found."""
    sizes = ["--prompt-tokens", "100", "--new-tokens", "2", "--repeat", "1"]
    ok("bench", DEMO, *sizes, "--dtype", "int8", "--trace", tmp_path / "trace")
    ids = python_mixtral.Trace.load(tmp_path / "trace").topk_ids.long()  # [N, L, K]
    counts = [torch.bincount(ids[:, layer].flatten(), minlength=8).tolist() for layer in range(4)]
    (tmp_path / "counts.json").write_text(json.dumps({"topk_assignments": {"prompt": counts}}))
    flags = [*SIMULATED, "--gpu-memory", memory_for(11, everything), "--routing-counts", tmp_path / "counts.json"]
    planned = ok_json("info", DEMO, *flags)["offload"]
    found = ok_json("bench", DEMO, *sizes, *flags)["expert_counts"]
    assert planned["routing"] == "counts" and planned["gpu_experts"] == 11
    assert planned["hits_per_token"] * len(ids) == pytest.approx(found["hits"])
    assert planned["misses_per_token"] * len(ids) == pytest.approx(found["misses"])


# ---- what it will take -----------------------------------------------------------------------------------------------


def test_a_token_takes_its_parts(everything):
    some = plan(DEMO, memory_for(8, everything), *SIMULATED)
    misses = some["misses_per_token"] * some["miss_seconds"]
    assert misses == pytest.approx(some["misses_seconds_per_token"])
    seconds = some["fixed_seconds"] + some["hits_per_token"] * some["hit_seconds"] + misses
    assert seconds == pytest.approx(some["decode_seconds_per_token"])
    assert some["decode_tokens_per_second"] == pytest.approx(1 / seconds)
    assert min(some["fixed_seconds"], some["hit_seconds"], some["miss_seconds"]) > 0
    text = ok("info", DEMO, "--gpu-memory", memory_for(8, everything), *SIMULATED).decode()
    assert re.search(r"^gpu memory +simulated, .* beside the experts, .* of staging buffers", text, re.M), text
    assert re.search(r"^on the gpu +8 of 32 experts, 2 of each layer", text, re.M), text
    assert re.search(r"^on the cpu +24 experts, 6 of each layer", text, re.M), text
    assert re.search(r"^a token +2.0 choices find .* and 6.0 miss it, by even routing", text, re.M), text
    assert re.search(r"^decode .* tokens/s: .* beside the experts, 2.0 x .* of hits, 6.0 x .* of misses$", text, re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_misses_are_forecast(big_model):
    """Nothing is loaded: there are no weights."""
    flags = "--dtype", "int4"
    some = plan(big_model, "16GiB", *flags)
    assert 0 < some["gpu_experts"] < 256 and sum(some["gpu_experts_by_layer"]) == some["gpu_experts"]
    used = sum(some[name] for name in ("fixed_bytes", "activations_bytes", "staging_bytes", "gpu_expert_bytes"))
    assert 16 * GIB - some["expert_bytes"] < used <= 16 * GIB
    assert some["hits_per_token"] == pytest.approx(64 * some["gpu_experts"] / 256)
    unknown = "fixed_seconds", "hit_seconds", "decode_seconds_per_token", "decode_tokens_per_second"
    assert [some[name] for name in unknown] == [None] * 4
    assert some["misses_seconds_per_token"] == some["misses_per_token"] * some["miss_seconds"] > 0
    text = ok("info", big_model, "--gpu-memory", "16GiB", *flags).decode()
    assert re.search(r"^decode +at most .* tokens/s: .* misses; the GPU's part is not known", text, re.M), text
    text = ok("info", big_model, "--gpu-memory", "80GiB", *flags).decode()
    assert re.search(r"^decode +not known: no choice is a miss", text, re.M), text


# ---- what fails ------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_the_error_of_loading(everything):
    flags = [*SIMULATED, "--gpu-memory", str(int(memory_for(0, everything)) - 1)]
    message = refused(4, "generate", DEMO, *PROMPT, *flags)
    assert "gpu_memory must be at least" in message and "two experts of" in message
    assert refused(4, "info", DEMO, *flags) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--simulate-gpu"], "simulate_gpu needs gpu_memory"),
        (["--gpu-memory", "1GiB", "--simulate-gpu", "--device", "cuda"], "simulate_gpu needs device cpu, got cuda"),
        (["--gpu-memory", "1GiB", "--simulate-gpu", "--weights", "mmap"], "gpu_memory needs weights read or direct"),
        (["--gpu-memory", "1GiB", "--simulate-gpu", "--tp", "2"], "gpu_memory needs the whole model in one process"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags_that_exclude_one_another(flags, message):
    assert message in refused(2, "info", DEMO, *flags)
    assert message in refused(2, "generate", DEMO, *PROMPT, *flags)


def test_counts_of_another_model(tmp_path):
    flags = [*SIMULATED, "--gpu-memory", "1GiB", "--routing-counts", tmp_path / "counts.json"]
    assert "counts.json" in refused(3, "info", DEMO, *flags)
    (tmp_path / "counts.json").write_text(json.dumps({"topk_assignments": {"text": [[1, 2]]}}))
    for command in (["info", DEMO], ["generate", DEMO, *PROMPT]):
        assert "must be of 4 layers of 8 experts" in refused(2, *command, *flags)


def test_a_dense_model_has_no_experts_to_leave_out(tmp_path):
    dense = {**MIXTRAL_8X7B, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in dense.items() if "experts" not in k}))
    assert "gpu_memory needs a model with experts" in refused(2, "info", tmp_path, "--gpu-memory", "80GiB")
