"""A model cut over processes of this host, against one process: tokens a second, bytes sent, the pipeline's bubble.

Decoding is that of the shape ``small``, which reads 0.77 GB for a token; the bubble is that of a model of 0.7 G
weights. What is compared takes turns, and medians count. Ranks have one thread each; the rows say how many one process
has.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import mixtral
from common import Bench, Row, main
from mixtral import _C
from random_models import SHAPES, Shape, quantised_checkpoint, write_checkpoint

SHAPE = Shape(hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, intermediate=3584, vocab=4096)
TURNS = 3
# The same with experts that are read soon: what is sent does not depend on their size.
THIN = replace(SHAPE, intermediate=256)
MODELS = Path(tempfile.gettempdir()) / "mixtral-bench-models"
DECODE_FOLDER, FOLDER, THIN_FOLDER = MODELS / "small", MODELS / "parallel", MODELS / "parallel-thin"
PROMPT = 128  # tokens of a pass, for the bubble
PASSES = (1, 2, 4, 8)
STAGES = 2


@dataclass(frozen=True)
class Decode:
    """Two ways to decode, which take turns: flags of the binary's bench."""

    case: str
    ours: str
    peer: str
    peer_flags: str
    goal: float  # what the ratio of their speeds should be at least
    dtype: str = "bfloat16"


DECODE = [
    Decode("tp2, 1 request", "--tp 2 -t 1", "1 process, 2 threads", "-t 2", 0.90),
    Decode("tp2, experts cut, 1 request", "--tp 2 -t 1 --no-expert-parallel", "1 process, 2 threads", "-t 2", 0.90),
    Decode("tp2 over Gloo, 1 request", "--tp 2 -t 1 --parallel-backend gloo", "1 process, 2 threads", "-t 2", 0.65),
    Decode(
        "tp2 over Gloo, experts cut, 1 request",
        "--tp 2 -t 1 --no-expert-parallel --parallel-backend gloo",
        "1 process, 2 threads",
        "-t 2",
        0.65,
    ),
    Decode("tp2, 8 requests", "--tp 2 -t 1 --batch 8", "1 process, 1 thread", "-t 1 --batch 8", 1.5),
    # Two passes of one request each are in flight. One process reads the experts that both want once.
    Decode("pp2, 2 requests", "--pp 2 -t 1 --batch 2", "1 process, 1 thread, one by one", "-t 1", 1.7),
    Decode("pp2, 2 requests, int4", "--pp 2 -t 1 --batch 2", "1 process, 1 thread, one by one", "-t 1", 1.7, "int4"),
    Decode("pp2, 2 requests in a batch", "--pp 2 -t 1 --batch 2", "1 process, 1 thread", "-t 1 --batch 2", 1.7),
    Decode("pp2, 1 request", "--pp 2 -t 1", "1 process, 1 thread", "-t 1", 0.95),
]
ALL_REDUCE_GOAL = 20e-6  # seconds, through shared memory


def decode_rate(folder: Path, flags: str) -> float:
    """Tokens a second of the binary."""
    work = ["--prompt-tokens", "32", "--new-tokens", "33", "--repeat", "2", "--ctx-size", "128", "--json"]
    command = [sys.executable, "-m", "mixtral", "bench", folder, *work, *flags.split()]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)["decode_tokens_per_second"]


def decode(bench: Bench) -> None:
    for row in DECODE:
        folder = DECODE_FOLDER if row.dtype == "bfloat16" else quantised_checkpoint(DECODE_FOLDER, row.dtype)
        rates = [(decode_rate(folder, row.ours), decode_rate(folder, row.peer_flags)) for _ in range(TURNS)]
        ours, peer = (statistics.median(column) for column in zip(*rates, strict=True))
        bench.rows.append(Row(row.case, "decode", ours, "tokens/s", None, None, row.peer, peer, ours / peer))
        goal = f"goal {row.goal:.2f}"
        print(f"{row.case:37s} {ours:8.2f} tokens/s, x {ours / peer:.2f} of {row.peer} ({goal})", flush=True)


# ---- the collective alone ----


def all_reduce_seconds(backend: str) -> float:
    """The median time of a sum over two ranks of 16 KB in bf16."""
    world = _C.join_ranks(_rank_options("all-reduce", "", tensor_size=2, backend=backend))
    return _all_reduce(world)


def _all_reduce(world: _C.Communicator) -> float:
    tensor, times = torch.ones(8192, dtype=torch.bfloat16), []
    for _ in range(2000):
        begin = time.perf_counter()
        world.all_reduce_ordered(tensor)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def all_reduce(bench: Bench) -> None:
    shm, gloo = all_reduce_seconds("shm"), all_reduce_seconds("gloo")
    bench.rows.append(
        Row("all_reduce of 16 KB, 2 ranks", "shm", 1 / shm, "1/s", None, None, "Gloo", 1 / gloo, gloo / shm)
    )
    goal = f"goal {1e6 * ALL_REDUCE_GOAL:.0f} us"
    print(f"all_reduce of 16 KB: shm {1e6 * shm:.1f} us ({goal}), Gloo {1e6 * gloo:.1f} us", flush=True)


# ---- models whose other rank tells what it did ----


def _rank_options(work: str, out: str, **options: object) -> _C.RankOptions:
    """The other ranks run ``rank`` of this file."""
    text = json.dumps({"work": work, "out": out, **options})
    return _C.RankOptions(**options, command=[sys.executable, __file__, "--rank", text])


def _load(ranks: _C.RankOptions) -> _C.Mixtral:
    return _C.Mixtral.from_pretrained(THIN_FOLDER, torch.device("cpu"), "auto", pack=True, ranks=ranks)


def rank(text: str) -> None:
    """What a rank of this benchmark runs that is not the first."""
    options = json.loads(text)
    work, out = options.pop("work"), options.pop("out")
    torch.set_num_threads(1)
    if work == "all-reduce":
        _all_reduce(_C.join_ranks(_C.RankOptions(**options)))
        return
    model = _load(_C.RankOptions(**options))
    model.follow()
    Path(out).write_text(str(model.bytes_sent))


def random_prompts(count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, SHAPE.vocab, (count, tokens), generator=generator).tolist()


def bytes_sent(ranks: dict[str, object], tokens: int = 64) -> list[int]:
    """By each of two ranks, for so many tokens of one request, without what is sent for none."""
    totals = []
    for count in (2, 2 + tokens):
        with tempfile.NamedTemporaryFile() as out:
            model = mixtral.Mixtral(_load(_rank_options("model", out.name, **ranks)), kv_memory=1 << 26)
            model.generate(random_prompts(1, 16), max_tokens=count, ignore_eos=True)
            own = model._model.bytes_sent
            del model
            totals.append([own, _other(out.name)])
    return [after - before for before, after in zip(*totals, strict=True)]


def _other(out: str) -> int:
    """What the other rank wrote when it ended."""
    while not (text := Path(out).read_text()):
        time.sleep(0.01)
    return int(text)


def wire(bench: Bench) -> None:
    """Against what the layouts are derived to send (docs/parallel.md); the plans of the passes come on top."""
    hidden, tokens = 2 * SHAPE.hidden, 64  # bytes of a row
    logits = (hidden + 2 * SHAPE.vocab / 2) / 2  # rank 0 sends the row, and the other one half of its logits
    cases = {
        "tp2": ({"tensor_size": 2}, SHAPE.layers * (2 + SHAPE.top_k) * hidden / 2 + logits),
        "tp2, experts cut": ({"tensor_size": 2, "expert_parallel": False}, SHAPE.layers * (1 + 1) * hidden + logits),
        "pp2": ({"stages": 2}, hidden),
    }
    for case, (ranks, derived) in cases.items():
        sent = bytes_sent(ranks, tokens)
        measured = sent[1] / tokens if "stages" in ranks else sum(sent) / 2 / tokens
        row = Row(case, "tokens for each MB that a rank sends", 1e6 / measured, "tokens/MB", 1e6 / derived)
        row.percent_of_bound = 100 * derived / measured
        bench.rows.append(row)
        print(f"{case}: {measured:.0f} bytes a token, {derived:.0f} derived", flush=True)


# ---- the bubble ----


def ranks() -> list[int]:
    """The processes of this one and of the ranks that it has started."""
    found = [os.getpid()]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def busy_seconds(process: int) -> float:
    """That its threads have run on a processor."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{process}/task").glob("*/schedstat")) / 1e9


def busy_share(model: mixtral.Mixtral, passes: int) -> float:
    """Of the time from the first of ``passes`` prompts to the last, that in which a stage computes; both together."""
    stages = ranks()
    before, begin = sum(map(busy_seconds, stages)), time.perf_counter()
    model.generate(random_prompts(passes, PROMPT), max_tokens=1, ignore_eos=True)
    span = time.perf_counter() - begin
    return (sum(map(busy_seconds, stages)) - before) / (STAGES * span)


def bubble(bench: Bench) -> None:
    options = {"kv_memory": 1 << 26, "chunk_size": PROMPT, "token_budget": PROMPT, "prefix_cache": False}
    model = mixtral.Mixtral.from_pretrained(FOLDER, pipeline_parallel_size=STAGES, **options)
    busy_share(model, 1)
    for passes in PASSES:
        share = statistics.median(busy_share(model, passes) for _ in range(TURNS))
        bound = passes / (passes + STAGES - 1)
        case = f"pp2, {passes} passes" if passes > 1 else "pp2, 1 pass"
        bench.rows.append(Row(case, "busy share of the stages", share, "of 1", bound, 100 * share / bound))
        print(f"{case}: bubble {1 - share:.3f}, by the formula {1 - bound:.3f}", flush=True)


def run(bench: Bench) -> None:
    torch.set_num_threads(1)
    write_checkpoint(SHAPES["small"], DECODE_FOLDER)
    write_checkpoint(SHAPE, FOLDER)
    write_checkpoint(THIN, THIN_FOLDER)
    decode(bench)
    all_reduce(bench)
    wire(bench)
    bubble(bench)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2])
    else:
        main("parallel", run, devices=("cpu",))
