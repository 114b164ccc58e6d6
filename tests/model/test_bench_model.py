"""The whole-model benchmark: its checkpoints are what they claim to be, its workers obey, its rows say what was run."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import mixtral
from bench_model import MEASURES, Turns, bound_rows, groups_that_fit, rate_rows, resource_rows
from engines import VOCAB, Worker, missing_packages
from random_models import SHAPES, Shape, write_checkpoint

TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=48, vocab=VOCAB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(TINY, tmp_path_factory.mktemp("models") / "tiny")


def turns_of(engines: dict[str, float]) -> Turns:
    """Turns in which each engine did everything at its rate."""
    turns = Turns(load_seconds=dict.fromkeys(engines, 2.0), peak_memory=dict.fromkeys(engines, 1e9), bandwidth=[10.0])
    for engine, rate in engines.items():
        for measure in MEASURES:
            turns.rates[engine, measure.name][""] += [rate, 100 * rate, rate]  # the median drops the outlier
    return turns


def test_checkpoint_is_one_model_to_us_and_to_transformers(folder):
    ids = torch.tensor([[1, 5, 31999, 7, 260]])
    ours = mixtral.Mixtral.from_pretrained(folder, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
    assert ours.config.window == 0 and theirs.config.sliding_window is None
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"] == 1e6


def test_checkpoint_has_the_weights_that_the_shape_counts(folder):
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes |= {name: tensors.get_tensor(name).numel() for name in tensors.keys()}
    assert sum(n for name, n in sizes.items() if "norm" not in name) == TINY.weights
    idle_experts = [f"experts.{e}." for e in range(TINY.top_k, TINY.experts)]
    read = [n for name, n in sizes.items() if "norm" not in name and not any(e in name for e in idle_experts)]
    assert sum(read) - sizes["model.embed_tokens.weight"] == TINY.weights_per_token
    assert round(SHAPES["mid"].weights / 1e9, 2) == 3.03


def test_checkpoint_is_kept_when_complete_and_never_mixed_with_another(folder):
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_checkpoint(TINY, folder)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match="must hold the same shape"):
        write_checkpoint(SHAPES["mini"], folder)


def test_same_seed_same_checkpoint(folder, tmp_path):
    again = write_checkpoint(TINY, tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_worker_loads_obeys_and_says_why_it_died(engine, folder):
    worker = Worker(engine, folder, "bfloat16", threads=1)
    assert worker.load_seconds > 0
    assert worker.ask("prefill", tokens=20) > 0
    assert worker.ask("decode", batch=2, prompt=8, steps=3) > 0
    assert 50e6 < worker.ask("peak_memory") < 4e9
    with pytest.raises(RuntimeError, match=rf"(?s){engine}: the worker died.*no_such_command"):
        worker.ask("no_such_command")
    worker.close()


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("engines.PACKAGES", {"llama.cpp": ["torch", "no_such_package"]})
    assert missing_packages("llama.cpp") == ["no_such_package"]


def test_rows_compare_with_the_group_that_the_peer_was_in():
    fast, slow = turns_of({"ours": 10.0, "transformers": 4.0}), turns_of({"ours": 6.0, "llama.cpp": 12.0})
    groups = {"ours": slow, "transformers": fast, "llama.cpp": slow}
    rows = {(row.metric, row.peer): row for row in rate_rows("mid", "bfloat16", ["transformers", "llama.cpp"], groups)}
    assert len(rows) == sum(len(measure.peers) for measure in MEASURES)
    decode = rows["decode", "llama.cpp"]
    assert (decode.value, decode.peer_value, decode.ratio, decode.goal) == (6.0, 12.0, 0.5, 1.0)
    assert (rows["prefill 512", "transformers"].ratio, rows["prefill 512", "transformers"].goal) == (2.5, 1.5)


def test_better_experts_implementation_of_a_peer_counts():
    turns = turns_of({"ours": 10.0})
    turns.rates["transformers", "decode"] |= {"eager": [3.0], "grouped_mm": [5.0]}
    assert turns.rate("transformers", "decode") == 5.0


def test_rows_of_a_peer_that_did_not_run_stay_empty():
    groups = {"ours": turns_of({"ours": 10.0})}
    for row in (
        rate_rows("mid", "int8", ["llama.cpp"], groups) + resource_rows("mid", "int8", ["llama.cpp"], groups)[:2]
    ):
        assert row.value > 0 and row.peer == "llama.cpp" and row.peer_value is None and row.ratio is None
    json.dumps([vars(row) for row in rate_rows("mid", "int8", ["llama.cpp"], groups)])


def test_decode_bound_is_reading_the_weights_of_a_token():
    decode = next(row for row in bound_rows("mid", "int8", turns_of({"ours": 5.0})) if row.metric == "decode")
    assert decode.bound == pytest.approx(10e9 / SHAPES["mid"].weights_per_token)
    assert decode.percent_of_bound == pytest.approx(100 * 5.0 / decode.bound)


def test_engines_share_memory_only_when_they_fit(tmp_path):
    paths = dict.fromkeys(["ours", "transformers", "llama.cpp"], tmp_path)
    assert [list(group) for group in groups_that_fit(paths, 1.0)] == [["ours", "transformers", "llama.cpp"]]
    assert [list(group) for group in groups_that_fit(paths, 1e15)] == [["ours", "transformers"], ["ours", "llama.cpp"]]
