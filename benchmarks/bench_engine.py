"""What the engine makes of requests: steps without a model, batches, a long prompt, guessed tokens; on the CPU.

The model has Mixtral's form and 0.7 G weights, so that decoding one token reads 0.4 GB. What is compared takes turns,
and medians count.
"""

import argparse
import statistics
import threading
import time
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

import mixtral
from common import Bench, Row
from random_models import Shape, model_config

SHAPE = Shape(hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, intermediate=3584, vocab=4096)
TURNS = 5
STEPS = 400
LONG_PROMPT, CHUNKS = 4096, (128, 256, 512)  # 256 is what `mixtral serve` reads beside others
KV_MEMORY = 1 << 28


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE.vocab, (count,), generator=generator).tolist()


def engine_on(model: mixtral.Mixtral, **options: int) -> mixtral.Mixtral:
    """Another engine for the same weights."""
    return mixtral.Mixtral(model._model, kv_memory=KV_MEMORY, **options)


# ---- without a model ----


def steps(bench: Bench, _: mixtral.Mixtral) -> None:
    package = Path(mixtral.__file__).parent
    extension = load(
        "bench_engine_steps",
        [str(Path(__file__).with_name("engine_steps.cpp"))],
        extra_cflags=["-O3"],  # as the library
        extra_ldflags=[f"-L{package}", "-lmixtral", f"-Wl,-rpath,{package}"],
        with_cuda=False,
    )
    for sequences in (64, 256):
        seconds = statistics.median(extension.seconds_of_steps(sequences, STEPS))
        case = f"{sequences} sequences decode, no model"
        bench.rows.append(Row(case, "steps: planned, laid out, told of", 1 / seconds, "1/s"))


# ---- batches ----


def decode_rate(model: mixtral.Mixtral, sequences: int) -> float:
    prompts = [random_ids(32, seed) for seed in range(sequences)]
    model.generate(prompts, max_tokens=33, temperature=1.0, seed=1, ignore_eos=True)
    return 32 * sequences / model.timings.decode_seconds


def batches(bench: Bench, model: mixtral.Mixtral) -> None:
    engine = engine_on(model)
    rates: dict[int, list[float]] = {1: [], 8: []}
    decode_rate(engine, 8)
    for _ in range(TURNS):
        for sequences in rates:
            rates[sequences].append(decode_rate(engine, sequences))
    one, eight = (statistics.median(rates[sequences]) for sequences in (1, 8))
    # A step reads all that is shared, and of E experts those that one of its tokens wants, if routing is even.
    used = {n: SHAPE.experts * (1 - (1 - SHAPE.top_k / SHAPE.experts) ** n) for n in (1, 8)}
    shared = SHAPE.layers * SHAPE.attention_weights + SHAPE.vocab * SHAPE.hidden
    read = {n: shared + SHAPE.layers * count * SHAPE.expert_weights for n, count in used.items()}
    bound = one * 8 * read[1] / read[8]
    row = Row("8 requests", "decode", eight, "tokens/s", bound, 100 * eight / bound, "1 request", one, eight / one)
    bench.rows.append(row)


# ---- a long prompt beside requests that decode ----


def passes_of(engine: mixtral.Mixtral, prompt: list[int]) -> list[float]:
    """When the passes of the prompt ended; the first number is its begin."""
    times = [time.perf_counter()]
    engine.generate([prompt], max_tokens=1, ignore_eos=True, on_text=lambda *_: times.append(time.perf_counter()))
    return times


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def beside_decodes(engine: mixtral.Mixtral, prompt: list[int]) -> tuple[list[float], list[float]]:
    """The passes of the prompt, and the gaps between tokens of four requests meanwhile."""
    tokens: list[list[float]] = [[] for _ in range(4)]
    begun, done = threading.Event(), threading.Event()

    def on_text(index: int, _: str) -> bool:
        tokens[index].append(time.perf_counter())
        if len(tokens[3]) == 4:
            begun.set()
        return not done.is_set()

    prompts = [random_ids(16, seed) for seed in range(4)]
    decode = threading.Thread(
        target=engine.generate,
        args=(prompts,),
        kwargs=dict(max_tokens=1000, temperature=1.0, seed=1, ignore_eos=True, on_text=on_text),
    )
    decode.start()
    begun.wait()
    times = passes_of(engine, prompt)
    done.set()
    decode.join()
    meanwhile = [[at for at in each if times[0] <= at <= times[-1]] for each in tokens]
    return times, [gap for each in meanwhile for gap in gaps(each)]


def long_prompt(bench: Bench, model: mixtral.Mixtral) -> None:
    prompt = random_ids(LONG_PROMPT, 5)
    whole = passes_of(engine_on(model, chunk_size=LONG_PROMPT, token_budget=LONG_PROMPT), prompt)
    for chunk in CHUNKS:
        alone = passes_of(engine_on(model, chunk_size=chunk), prompt)
        beside, waits = beside_decodes(engine_on(model, mixed_chunk_size=chunk), prompt)
        step, wait = (statistics.quantiles(seconds, n=100)[98] for seconds in (gaps(alone), waits))
        case = f"{LONG_PROMPT} prompt tokens, {chunk} a pass, beside 4 requests"
        metric, peer = "99 % of their tokens wait at most, 1/s", f"passes of {chunk} tokens alone"
        bench.rows.append(Row(case, metric, 1 / wait, "1/s", peer=peer, peer_value=1 / step, ratio=step / wait))
        rate, of_whole = (LONG_PROMPT / (times[-1] - times[0]) for times in (beside, whole))
        peer = "in one pass, alone"
        bench.rows.append(Row(case, "prefill", rate, "tokens/s", peer=peer, peer_value=of_whole, ratio=rate / of_whole))


# ---- guessed tokens ----


def copying(model: mixtral.Mixtral) -> list[int]:
    """Makes the model continue every token with one certain other, and returns a text that does so.

    The embedding outweighs what the layers add, and lm_head compares with the embedding of the token before.
    """
    cycle = torch.randperm(SHAPE.vocab, generator=torch.Generator().manual_seed(3))
    parameters = model.named_parameters()
    embedding = parameters["embed_tokens"]
    embedding.mul_(100)
    rows = torch.empty_like(embedding)
    rows[cycle.roll(-1)] = embedding[cycle] / 100
    head = parameters["lm_head"]
    head.copy_(mixtral.ops.pack_weight(rows[None]).view_as(head) if head.dim() > 2 else rows)
    return cycle[:256].tolist()


def guess_rates(model: mixtral.Mixtral, prompt: list[int], temperature: float) -> tuple[float, float, float]:
    """Tokens per second with and without guesses, and the share of the guesses that held."""
    engines = {speculate: engine_on(model, speculate=speculate) for speculate in (0, 8)}
    rates: dict[int, list[float]] = {0: [], 8: []}
    tokens = []
    for turn in range(TURNS + 1):
        for speculate, engine in engines.items():
            (result,) = engine.generate([prompt], max_tokens=161, temperature=temperature, seed=turn, ignore_eos=True)
            tokens.append(result.token_ids)
            rates[speculate].append(160 / engine.timings.decode_seconds)
        assert tokens[-1] == tokens[-2]
    timings = engines[8].timings
    held = timings.accepted_tokens / max(1, timings.drafted_tokens)
    return statistics.median(rates[8][1:]), statistics.median(rates[0][1:]), held


def guesses(bench: Bench, model: mixtral.Mixtral) -> None:
    cases = (
        ("random text, --speculate 8", lambda: random_ids(256, 7), 1.0),
        ("copied text, --speculate 8", lambda: (text := copying(model)) + text[:4], 0.0),
    )
    for case, prompt, temperature in cases:
        rate, peer, held = guess_rates(model, prompt(), temperature)
        bench.rows.append(Row(case, "decode", rate, "tokens/s", None, None, "no guesses", peer, rate / peer))
        print(f"{case}: {100 * held:.0f} % of the guesses held")


PARTS = {"steps": steps, "batches": batches, "long prompt": long_prompt, "guesses": guesses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--part", choices=PARTS, help="one part alone; a record keeps the others (common.py)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-engine.json")
    arguments = parser.parse_args()
    bench = Bench("engine", "cpu")
    config = model_config(SHAPE, max_position=2 * LONG_PROMPT)
    model = mixtral.Mixtral.from_config(config, dtype="bfloat16", kv_memory=KV_MEMORY)
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            part(bench, model)
    for row in bench.rows:
        print(row)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
