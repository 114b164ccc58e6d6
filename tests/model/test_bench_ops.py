"""The op benchmarks: who is timed when, what counts, and that the peers compute what the ops do."""

import json
from pathlib import Path

import pytest
import torch

import bench_moe_mlp
import bench_moe_permute
import mixtral.ops as ops
import run_all
import timing
from bench_sliding_window_attention import flex, sdpa, sight
from common import Bench, Row
from roofline import Rates, bound_of, data_sheet_rates, hopper_peak
from timing import Sample

RATES = Rates(bandwidth=10.0, arithmetic=100.0)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr("common.rates_of", lambda device, dtype: RATES)
    return Bench("test", "cpu")


def test_functions_take_turns_and_medians_count(monkeypatch):
    calls, durations = [], {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0, 5.0, 4.0, 6.0])}

    class Timer:
        def __init__(self, function) -> None:
            self.name = function()

        def seconds(self) -> float:
            calls.append(self.name)
            return next(durations[self.name])

    monkeypatch.setitem(timing.TIMERS, "cpu", Timer)
    samples = timing.take_turns({"a": lambda: "a", "b": lambda: "b"}, "cpu", budget=0.0)
    assert calls == ["a", "b"] * 4  # the first round only tells how many there will be
    assert (samples["a"].seconds, samples["b"].seconds) == (2.0, 5.0)
    assert samples["a"].variation == pytest.approx((2 / 3) ** 0.5 / 2)


def test_the_fastest_peer_counts(bench, monkeypatch):
    samples = {"ours": Sample(0.001, 0.1), "slow": Sample(0.004, 0.1), "fast": Sample(0.002, 0.1)}
    monkeypatch.setattr("common.take_turns", lambda functions, device, budget: samples)
    assert bench.compare("case", print, {"slow": print, "fast": print}, gigabytes=0.005) == samples
    (row,) = bench.rows
    assert (row.peer, row.ratio, row.percent_of_bound) == ("fast", 2.0, 50.0)
    assert (row.value, row.peer_value, row.unit) == (5.0, 2.5, "GB/s")


def test_a_record_has_a_row_a_line(bench, tmp_path):
    bench.rows = [Row("a", "decode", 2.0, "tokens/s"), Row("b", "decode", 3.0, "tokens/s", peer="p")]
    bench.write(tmp_path)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert [row["value"] for row in record["rows"]] == [2.0, 3.0]
    empty = dict.fromkeys(("bound", "percent_of_bound", "peer", "peer_value", "ratio", "goal"))
    assert record["rows"][0] == {"case": "a", "metric": "decode", "value": 2.0, "unit": "tokens/s"} | empty
    assert sum('"case"' in line for line in path.read_text().splitlines()) == 2


def test_a_record_is_made_in_parts_by_one_commit(bench, tmp_path, monkeypatch):
    def cases_after(case: str, value: float, commit: str) -> list[tuple[str, float]]:
        monkeypatch.setenv("MIXTRAL_COMMIT", commit)
        bench.rows = [Row(case, "decode", value, "tokens/s")]
        bench.write(tmp_path)
        (path,) = tmp_path.iterdir()
        return [(row["case"], row["value"]) for row in json.loads(path.read_text())["rows"]]

    assert cases_after("a", 1.0, "one") == [("a", 1.0)]
    assert cases_after("b", 2.0, "one") == [("a", 1.0), ("b", 2.0)]
    assert cases_after("a", 3.0, "one") == [("b", 2.0), ("a", 3.0)]
    assert cases_after("a", 4.0, "two") == [("a", 4.0)]


def test_bound_is_the_slower_of_memory_and_arithmetic():
    memory, arithmetic = bound_of(1.0, 9.9, RATES, "cpu"), bound_of(1.0, 10.1, RATES, "cpu")
    assert (memory.unit, memory.work, memory.rate) == ("GB/s", 1.0, 10.0)
    assert (arithmetic.unit, arithmetic.work, arithmetic.rate) == ("GFLOP/s", 10.1, 100.0)
    assert bound_of(1.0, 10.1, RATES, "cuda").unit == "TFLOP/s"
    assert bound_of(1.0, 10.1, RATES, "cuda").rate == pytest.approx(0.1)


def test_data_sheet_is_that_of_the_gpu():
    assert data_sheet_rates("NVIDIA H100 80GB HBM3", 2) == Rates(3350.0, 989.4e3)
    assert data_sheet_rates("NVIDIA H100 PCIe", 2) is None  # slower: it must not be taken for the other
    assert hopper_peak(132, 1830) == pytest.approx(989.4, rel=1e-3)  # the clock that the data sheet assumes


def test_work_of_a_layer_of_8x7b():
    work = bench_moe_mlp.work_of(1024, 8, bench_moe_mlp.HIDDEN, bench_moe_mlp.INTERMEDIATE, 2 * 176160768)
    assert work["gflop"] == pytest.approx(1024 * 0.7046, rel=1e-4)
    assert work["gigabytes"] == pytest.approx(2 * 8 * 0.176160768 + 4 * 1024 * 4096 / 1e9)


def test_routings_are_what_they_are_called():
    torch.manual_seed(0)
    counts = {}
    for routing in ("uniform", "Zipf", "one pair"):
        weights, ids = bench_moe_mlp.route(routing, 4000, "cpu")
        assert weights.isfinite().all()
        counts[routing] = ids.flatten().long().bincount(minlength=8)
    assert counts["uniform"].min() > 0.9 * 1000 and counts["uniform"].max() < 1.1 * 1000
    assert counts["Zipf"][0] > 2 * counts["Zipf"][2] and (counts["Zipf"].diff() < 0).all()
    assert counts["one pair"].tolist() == [4000, 4000, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("quantize", "bytes_per_weight"), [(None, 2), ("fp8", 1 + 4 / 64), ("int4", 0.53125)])
def test_experts_are_counted_in_the_bytes_of_their_format(quantize, bytes_per_weight):
    plain = bench_moe_mlp.make_experts("cpu", hidden=64, intermediate=64)
    experts = bench_moe_mlp.as_ours(plain.gate_up, plain.down, quantize)
    assert experts.expert_bytes == 3 * 64 * 64 * bytes_per_weight
    assert len(experts.ours_gate_up) == len(experts.ours_down) == bench_moe_mlp.EXPERTS


@pytest.mark.parametrize("routing", ["uniform", "one pair"])
def test_peers_of_the_expert_layer_compute_the_same(routing):
    experts = bench_moe_mlp.make_experts("cpu", hidden=64, intermediate=96)
    x = torch.randn(4, 64).bfloat16()
    weights, ids = bench_moe_mlp.route(routing, 4, "cpu")
    peers = bench_moe_mlp.peers_of(x, weights, ids, experts)
    peers |= bench_moe_mlp.transformers_peers(x, weights, ids, experts)
    assert len(peers) == 4
    expected = ops.moe_mlp(x, weights, ids, experts.ours_gate_up, experts.ours_down)
    for peer in peers.values():
        torch.testing.assert_close(peer(), expected, atol=0.03, rtol=0.02)


def test_peer_of_moe_permute_computes_the_same():
    x, ids = torch.randn(50, 8), torch.randint(0, 8, (50, 2), dtype=torch.int32)
    for ours, theirs in zip(ops.moe_permute(x, ids, 8), bench_moe_permute.sort_rows(x, ids, 8), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("window", [0, 1, 37, 100])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_of_attention_compute_the_same(window):
    q, (k, v), cu = torch.randn(100, 4, 16), torch.randn(2, 100, 2, 16), torch.tensor([0, 100])
    expected = ops.sliding_window_attention(q, k, v, cu, cu, window)
    for peer in (sdpa(q, k, v, sight(100, 100, window, "cpu")), flex(q, k, v, window, compiled=False)):
        torch.testing.assert_close(peer()[0].transpose(0, 1), expected, atol=1e-5, rtol=0)


def test_moe_mlp_writes_rows(bench, monkeypatch):
    monkeypatch.setitem(bench_moe_mlp.BUDGET, "cpu", 0.0)
    experts = bench_moe_mlp.make_experts("cpu", hidden=32, intermediate=32)
    bench_moe_mlp.run_case(bench, experts, "uniform", 512, "tiny")
    bench_moe_mlp.run_router(bench, experts, 16, "tiny")
    assert [row.case for row in bench.rows] == ["tiny T=512 uniform", "tiny T=16"]
    assert all(row.value > 0 for row in bench.rows)


def test_one_command_runs_every_benchmark_once():
    files = {path.name for path in Path(run_all.__file__).parent.glob("bench_*.py")}
    commands = run_all.commands("cpu")
    assert len(commands) == len(files) and {command[0] for command in commands} == files
    assert all(command[-3:] == ["--device", "cpu", "--record"] for command in commands)
    assert {command[0] for command in run_all.commands("cuda")} == files - run_all.CPU_ONLY
