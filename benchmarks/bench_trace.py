"""What it costs to record the routing: prefill and decode with and without, taking turns; on the CPU.

The first model is of Mixtral's form, large enough that its weights do not stay in the caches; the second, some 200
times smaller, is the worst case: its passes take less than a millisecond. Recording does the same work for a token in
both.
"""

import statistics
import time

import mixtral
from common import Bench, Row, main

SIZES = dict(head_dim=64, vocab_size=4096, max_position=1024, num_experts=8, top_k=2, rms_norm_eps=1e-5, rope_theta=1e6)
MODELS = {
    "370 M weights, 8 layers": dict(
        hidden_size=1024, intermediate_size=1792, num_layers=8, num_heads=16, num_kv_heads=4
    ),
    "2 M weights, 4 layers": dict(hidden_size=128, intermediate_size=192, num_layers=4, num_heads=2, num_kv_heads=1),
}
PROMPT = [5 + 7 * i % 4000 for i in range(512)]


def prefill(model: mixtral.Mixtral, traced: bool) -> float:
    start = time.perf_counter()
    model.generate([PROMPT], max_tokens=1, return_routed_experts=traced)
    return len(PROMPT) / (time.perf_counter() - start)


def decode(model: mixtral.Mixtral, traced: bool) -> float:
    model.generate([PROMPT[:8]], max_tokens=17, ignore_eos=True, return_routed_experts=traced)
    return 16 / model.timings.decode_seconds


SECONDS = {prefill: 8.0, decode: 30.0}  # a decoding step of the large model varies by 3 %


def paired_ratios(on: list[float], off: list[float]) -> list[float]:
    """Of the four turns that follow each other: what is slow for a while is slow for both."""
    return [(on[i] + on[i + 1]) / (off[i] + off[i + 1]) for i in range(0, len(on), 2)]


def run(bench: Bench) -> None:
    for name, sizes in MODELS.items():
        model = mixtral.Mixtral.from_config(mixtral.Config(**SIZES, **sizes), prefix_cache=False)
        for measure in (prefill, decode):
            rates: dict[bool, list[float]] = {False: [], True: []}
            measure(model, True)
            end = time.perf_counter() + SECONDS[measure]
            while time.perf_counter() < end or len(rates[True]) < 10:
                for traced in (False, True, True, False):  # neither goes first more often
                    rates[traced].append(measure(model, traced))
            off, on = (statistics.median(rates[traced]) for traced in (False, True))
            ratio = statistics.median(paired_ratios(rates[True], rates[False]))
            metric = f"{measure.__name__}, routing recorded"
            bench.rows.append(Row(name, metric, on, "tokens/s", peer="not recorded", peer_value=off, ratio=ratio))
            print(f"{name:26s} {metric:28s} {on:10.1f} tokens/s  x {ratio:.4f} of {off:.1f}, {len(rates[True])} turns")


if __name__ == "__main__":
    main("trace", run, devices=("cpu",))
