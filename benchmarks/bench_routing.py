"""How long ``mixtral route`` takes to analyse a trace, and how much memory: 200,000 tokens, 32 layers of 8 experts.

A process of its own reads the trace, analyses it and makes the report, as the command does after tracing.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import mixtral
from common import Bench, Row, main

TOKENS, LAYERS, EXPERTS, TOP_K, DOMAINS, DOCUMENT = 200_000, 32, 8, 2, 5, 512
ANALYSE = """
import resource, sys
import mixtral
from mixtral.routing import analyse
from mixtral.routing.report import report

trace = mixtral.Trace.load(sys.argv[1])
report(analyse(trace), trace)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def random_trace() -> mixtral.Trace:
    """Experts by chance, tokens as frequent as in text (Zipf)."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, 20_001)
    tokens = torch.multinomial(share, TOKENS, replacement=True, generator=generator).int()
    logits = torch.randn(TOKENS, LAYERS, EXPERTS, generator=generator).half()
    weights, ids = logits.float().softmax(-1).topk(TOP_K)
    row = torch.arange(TOKENS)
    return mixtral.Trace(
        token_ids=tokens,
        predicted_ids=tokens.roll(-1),
        positions=(row % DOCUMENT).int(),
        docs=(row // DOCUMENT).int(),
        domains=(row // DOCUMENT * DOMAINS // (TOKENS // DOCUMENT + 1)).byte(),
        special=torch.zeros(TOKENS, dtype=torch.bool),
        topk_ids=ids.byte(),
        topk_weights=weights.half(),
        router_logits=logits,
        domain_names=[f"domain {d}" for d in range(DOMAINS)],
        num_experts=EXPERTS,
        model="random",
        tokenizer="",
    )


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.safetensors"
        random_trace().save(file)
        start = time.perf_counter()
        child = subprocess.run([sys.executable, "-c", ANALYSE, file], stdout=subprocess.PIPE, check=True)
        seconds, peak = time.perf_counter() - start, int(child.stdout)
    case = f"{TOKENS} tokens, {LAYERS} layers of {EXPERTS}"
    bench.rows.append(Row(case, "read, analysed, report made", TOKENS / seconds, "tokens/s"))
    bench.rows.append(Row(case, "1 GiB over the peak memory of the process", 2**30 / peak, "x"))
    print(f"{case}: {seconds:.1f} s, {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main("routing", run, devices=("cpu",))
