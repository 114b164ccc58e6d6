"""The whole-model benchmark: its checkpoints are what they claim to be, its workers obey, its rows say what was run."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import bench_system
import mixtral
import model_cuda
from bench_model import (
    NATIVE,
    binary_peak_memory,
    bound_rows,
    groups_that_fit,
    isa_environment,
    isa_in_use,
    peers_of,
    rate_rows,
    resource_rows,
)
from common import Bench, native_isa
from peers.engines import VOCAB, Ours, Worker, missing_packages
from peers.turns import MEASURES, Turns
from random_models import MIXTRAL_8X7B, SHAPES, Shape, write_checkpoint
from roofline import Rates, measure_fma_peak

TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=48, vocab=VOCAB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(TINY, tmp_path_factory.mktemp("models") / "tiny")


def turns_of(engines: dict[str, float]) -> Turns:
    """Turns in which each engine did everything at its rate."""
    turns = Turns(load_seconds=dict.fromkeys(engines, 2.0), peak_memory=dict.fromkeys(engines, 1e9))
    turns.bandwidth, turns.fma_peak = [10.0], [200.0]
    for engine, rate in engines.items():
        for measure in MEASURES:
            turns.rates[engine, measure.name][""] += [rate, 100 * rate, rate]  # the median drops the outlier
    return turns


def test_checkpoint_is_one_model_to_us_and_to_transformers(folder):
    ids = torch.tensor([[1, 5, 31999, 7, 260]])
    ours = mixtral.Mixtral.from_pretrained(folder, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_checkpoint_has_the_weights_that_the_shape_counts(folder):
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes |= {name: tensors.get_tensor(name).numel() for name in tensors.keys()}
    assert sum(n for name, n in sizes.items() if "norm" not in name) == TINY.weights
    idle_experts = [f"experts.{e}." for e in range(TINY.top_k, TINY.experts)]
    read = [n for name, n in sizes.items() if "norm" not in name and not any(e in name for e in idle_experts)]
    assert sum(read) - sizes["model.embed_tokens.weight"] == TINY.weights_per_token


def test_checkpoint_is_kept_when_complete_and_never_mixed_with_another(folder):
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_checkpoint(TINY, folder)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match="must hold the same shape"):
        write_checkpoint(SHAPES["mini"], folder)


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_worker_loads_obeys_and_says_why_it_died(engine, folder):
    worker = Worker(engine, folder, "bfloat16", threads=1)
    assert worker.load_seconds > 0
    assert worker.ask("prefill", tokens=20) > 0
    assert worker.ask("decode", batch=2, prompt=8, steps=3) > 0
    of_python = worker.ask("peak_memory")
    assert 50e6 < of_python < 4e9
    with pytest.raises(RuntimeError, match=rf"(?s){engine}: the worker died.*no_such_command"):
        worker.ask("no_such_command")
    worker.close()
    if engine == "ours":
        assert 2 * TINY.weights < binary_peak_memory(folder, "bfloat16", 1, {}) < of_python


def test_our_engine_reads_a_prompt_anew_each_time(folder):
    engine = Ours(threads=torch.get_num_threads())
    engine.load(folder, "bfloat16")
    for turn in range(1, 3):
        engine.prefill(40)
        assert engine.model._engine.stats().prompt_tokens == 40 * turn
    assert engine.model._engine.stats().prefix_hits == 0


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("peers.engines.PACKAGES", {"llama.cpp": ["torch", "no_such_package"]})
    assert missing_packages("llama.cpp") == ["no_such_package"]


def test_rows_compare_with_the_group_that_the_peer_was_in():
    fast, slow = turns_of({"ours": 10.0, "transformers": 4.0}), turns_of({"ours": 6.0, "llama.cpp": 12.0})
    groups = {"ours": slow, "transformers": fast, "llama.cpp": slow}
    rows = {(row.metric, row.peer): row for row in rate_rows("mid bfloat16", ["transformers", "llama.cpp"], groups)}
    assert len(rows) == sum(len(measure.peers) for measure in MEASURES)
    decode = rows["decode", "llama.cpp"]
    assert (decode.value, decode.peer_value, decode.ratio) == (6.0, 12.0, 0.5)
    assert rows["prefill 512", "transformers"].ratio == 2.5


def test_better_experts_implementation_of_a_peer_counts():
    turns = turns_of({"ours": 10.0})
    turns.rates["transformers", "decode"] |= {"eager": [3.0], "grouped_mm": [5.0]}
    assert turns.rate("transformers", "decode") == 5.0


def test_rows_of_a_peer_that_did_not_run_stay_empty():
    groups = {"ours": turns_of({"ours": 10.0})}
    peers = ["llama.cpp"]
    for row in rate_rows("mid int8", peers, groups) + resource_rows("mid int8", 1e9, peers, groups):
        assert row.value > 0 and row.peer == "llama.cpp" and row.peer_value is None and row.ratio is None


def test_decode_bound_is_reading_the_weights_of_a_token():
    rows = bound_rows("mid int8", SHAPES["mid"], "int8", "avx2", turns_of({"ours": 5.0}))
    decode = next(row for row in rows if row.metric == "decode")
    assert decode.bound == pytest.approx(10e9 / SHAPES["mid"].weights_per_token)
    assert decode.percent_of_bound == pytest.approx(100 * 5.0 / decode.bound)


def test_prefill_is_bound_by_f32_where_bf16_has_no_instructions():
    for isa, bound in (("avx2", 200.0), ("avx512", 200.0), ("avx512_bf16", None), ("amx", None)):
        rows = bound_rows("mid int8", SHAPES["mid"], "int8", isa, turns_of({"ours": 5.0}))
        prefill = next(row for row in rows if row.metric == "prefill 512")
        assert prefill.value == pytest.approx(5.0 * SHAPES["mid"].prefill_flop(512) / 512 / 1e9)
        assert prefill.bound == bound
        assert prefill.percent_of_bound == (bound and pytest.approx(100 * prefill.value / bound))


def test_what_was_not_measured_has_no_row():
    turns = turns_of({"ours": 10.0})
    for measure in ("prefill 2048", "decode batch 8"):
        del turns.rates["ours", measure]
    rows = bound_rows("mid int8", SHAPES["mid"], "int8", "avx2", turns)
    rows += rate_rows("mid int8", ["llama.cpp"], {"ours": turns})
    assert {row.metric for row in rows} == {"prefill 512", "decode"}


def test_peak_of_f32_grows_with_the_registers():
    peak = measure_fma_peak(1, "avx2")
    assert 1 < peak < 1000
    if native_isa() not in ("baseline", "avx2"):
        assert measure_fma_peak(1, "avx512") > 0.9 * peak


def test_instruction_set_by_default_is_what_the_kernels_choose():
    """One above it is refused, and its own name is taken."""
    order = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    script = "import torch, mixtral.ops as ops; ops.pack_weight(torch.ones(1, 32, 32))"
    for isa in order[order.index(native_isa()) :]:
        environment = os.environ | {"MIXTRAL_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        if isa == native_isa():
            assert run.returncode == 0, run.stderr
        elif not (isa == "avx512_bf16" and native_isa() == "avx512"):  # Intel's cores have it, and are slower with it
            assert "must be one that this processor has" in run.stderr


def test_peers_are_those_that_can_be_held_to_the_instruction_set():
    with_llama = SimpleNamespace(peers=["transformers", "llama.cpp"], llama_avx2=Path("/libraries"))
    without = SimpleNamespace(peers=["transformers", "llama.cpp"], llama_avx2=None)
    assert peers_of("bfloat16", NATIVE, without) == ["transformers", "llama.cpp"]
    assert peers_of("int4", NATIVE, without) == peers_of("int4", "avx2", with_llama) == ["llama.cpp"]
    assert peers_of("bfloat16", "avx2", without) == peers_of("bfloat16", "avx512", with_llama) == ["transformers"]
    assert peers_of("fp8", NATIVE, with_llama) == []


def test_engines_share_memory_only_when_they_fit(tmp_path):
    paths = dict.fromkeys(["ours", "transformers", "llama.cpp"], tmp_path)
    assert [list(group) for group in groups_that_fit(paths, 1.0)] == [["ours", "transformers", "llama.cpp"]]
    assert [list(group) for group in groups_that_fit(paths, 1e15)] == [["ours", "transformers"], ["ours", "llama.cpp"]]


def test_environment_holds_torch_and_ours_to_the_instruction_set(folder):
    script = "import torch; print(torch.backends.cpu.get_cpu_capability()); torch.ones(8, 8).to_mkldnn()"
    environment = os.environ | isa_environment("avx2") | {"ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-u", "-c", script]  # -u: what Python and oneDNN print comes in this order
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert isa_environment(NATIVE) == {} and isa_in_use(NATIVE) == native_isa()
    assert isa_environment("avx2", folder)["LLAMA_CPP_LIB_PATH"] == str(folder)
    assert run.stdout.startswith("AVX2\n") and "isa:Intel AVX2" in run.stdout
    with pytest.raises(RuntimeError, match="MIXTRAL_CPU_ISA: must be baseline"):
        Worker("ours", folder, "bfloat16", 1, {"MIXTRAL_CPU_ISA": "pentium"}).ask("prefill", tokens=4)


def test_system_benchmark_counts_the_bytes_of_the_files(folder, monkeypatch):
    monkeypatch.setattr("bench_system.bench", lambda *arguments: {"load_seconds": 2.0})
    row = bench_system.loading_row("tiny", folder, "bfloat16", rounds=1)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert row.value == pytest.approx(size / 2e9) and row.bound > row.value


def test_system_benchmark_compares_a_busy_core_with_idle_ones(folder, monkeypatch):
    rates = iter(range(100, 112))
    monkeypatch.setattr("bench_system.bench", lambda *_, env: {"decode_tokens_per_second": next(rates)})
    rows = bench_system.thread_rows(folder, rounds=1)
    assert [row.value for row in rows] == list(range(100, 112))
    assert [row.peer_value for row in rows] == [None] * 6 + list(range(100, 106))
    assert "busy" in rows[6].case and "passive" in rows[3].case and "passive" not in rows[6].case


def test_a_decode_step_of_one_sequence_reads_the_weights_of_a_token():
    positions, routed = model_cuda.PROMPT + model_cuda.STEPS // 2, MIXTRAL_8X7B.layers * MIXTRAL_8X7B.top_k
    batch_of_one = model_cuda.step_bytes(MIXTRAL_8X7B, "bfloat16", 1, routed)
    assert batch_of_one == 2 * MIXTRAL_8X7B.weights_per_token + MIXTRAL_8X7B.cache_bytes(positions)
    assert 0.5 < model_cuda.step_bytes(MIXTRAL_8X7B, "fp8", 1, routed) / batch_of_one < 0.502  # routers are bf16


def test_all_layers_fit_an_h200_and_in_bf16_most_an_h100():
    fit = model_cuda.layers_that_fit
    assert fit(MIXTRAL_8X7B, 149 * 10**9, "bfloat16") == 32
    assert 24 <= fit(MIXTRAL_8X7B, 84 * 10**9, "bfloat16") < 28
    assert fit(MIXTRAL_8X7B, 84 * 10**9, "fp8") == fit(MIXTRAL_8X7B, 84 * 10**9, "int4") == 32


def test_rows_of_some_layers_are_scaled_to_all_and_say_so(monkeypatch):
    monkeypatch.setattr("model_cuda.PREFILL", 32)
    monkeypatch.setattr("model_cuda.PROMPT", 4)
    monkeypatch.setattr("model_cuda.STEPS", 2)
    monkeypatch.setattr("model_cuda.rates_of", lambda device, dtype: Rates(10.0, 100.0))
    bench, shape = Bench("model", "cpu"), replace(TINY, intermediate=64)
    full = replace(shape, layers=4)
    model_cuda.run_model(bench, shape, full, "int4", rounds=1)
    measured, scaled = bench.rows[0::2], bench.rows[1::2]
    assert all(row.case == "8x7B int4, 2 of 4 layers" for row in measured)
    assert all(row.case == "8x7B int4, scaled from 2 to 4 layers" for row in scaled)
    for some, all_layers in zip(measured, scaled, strict=True):
        assert all_layers.percent_of_bound == pytest.approx(100 * all_layers.value / all_layers.bound)
        assert 0.5 < all_layers.value / some.value < 1  # embedding and lm_head are read once in both
    assert scaled[0].bound == pytest.approx(100e9 * 32 / full.prefill_flop(32))
