"""The server under load, beside llama.cpp's (``pip install 'llama-cpp-python[server]'``) on the same GGUF file.

Both take turns on the same requests. Clients are closed loops: each sends its next request when the last has ended, and
every request is accounted for.
"""

import argparse
import asyncio
import importlib.util
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from common import Bench, Row
from http_load import Client, Outcome
from random_models import SHAPES, write_checkpoint

SHAPE = "mini"
NEW_TOKENS, LONG_NEW_TOKENS = 64, 400
PROMPT, LONG_PROMPT = 60, 2000  # letters, a token each
FIRST_TOKEN_GOAL, BETWEEN_TOKENS_GOAL = 1.0, 0.1  # seconds: a request that meets both is good
PATIENCE = 120.0


def text_of(characters: int, seed: int) -> str:
    return "".join(chr(ord("a") + (seed + i * i) % 26) for i in range(characters))


def ids_of(text: str) -> list[int]:
    """As llama.cpp reads the text with the file's made-up tokenizer: BOS, and a token for each byte behind a space."""
    return [1, *(3 + byte for byte in f"\u2581{text}".encode())]


def body(server: "Server", characters: int, new_tokens: int, seed: int) -> dict:
    """The same tokens for both servers; ours has no tokenizer for this file, and streams ids."""
    text = text_of(characters, seed)
    fields = {"max_tokens": new_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return {**fields, "prompt": ids_of(text), "return_token_ids": True} if server.ours else {**fields, "prompt": text}


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], port: int, ours: bool) -> None:
        self.port, self.ours = port, ours
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        end = time.monotonic() + PATIENCE
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                raise RuntimeError(f"{' '.join(command)}: {self._log.read()[-2000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        async def ask() -> bool:
            client = Client("127.0.0.1", self.port)
            outcome = await client.post(body(self, 1, 1, 0), deadline=20)
            client.close()
            return outcome.status == 200

        return asyncio.run(ask())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def start_ours(path: Path, threads: int) -> Server:
    port = free_port()
    flags = ["--port", str(port), "--threads", str(threads), "--log-level", "warning"]
    return Server([sys.executable, "-m", "mixtral", "serve", str(path), *flags], port, ours=True)


def start_llama(path: Path, threads: int) -> Server:
    port = free_port()
    flags = ["--model", str(path), "--port", str(port), "--n_ctx", "4096", "--verbose", "false"]
    flags += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "false"]
    return Server([sys.executable, "-m", "llama_cpp.server", *flags], port, ours=False)


async def closed_loop(server: Server, clients: int, seconds: float) -> list[Outcome]:
    """What ``clients`` get that begin requests for so long."""
    end = time.perf_counter() + seconds
    outcomes: list[Outcome] = []

    async def one(number: int) -> None:
        client = Client("127.0.0.1", server.port)
        seed = number
        while time.perf_counter() < end:
            outcomes.append(await client.post(body(server, PROMPT, NEW_TOKENS, seed), deadline=PATIENCE))
            seed += clients
        client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return outcomes


async def beside_a_long_prompt(server: Server) -> list[Outcome]:
    """Four streams, in the middle of which a long prompt arrives."""
    clients = [Client("127.0.0.1", server.port) for _ in range(5)]
    bodies = [body(server, PROMPT, LONG_NEW_TOKENS, i) for i in range(4)]
    streams = [asyncio.ensure_future(clients[i].post(bodies[i], deadline=PATIENCE)) for i in range(4)]
    await asyncio.sleep(1.0)
    await clients[4].post(body(server, LONG_PROMPT, 1, 9), deadline=PATIENCE)
    outcomes = list(await asyncio.gather(*streams))
    for client in clients:
        client.close()
    return outcomes


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Times:
    """What many outcomes say together."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        wrong = [outcome for outcome in outcomes if outcome.status != 200 or outcome.error or outcome.ends != 1]
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {len(outcomes)} requests failed, the first with {wrong[0]}")
        self.requests = len(outcomes)
        self.first = [outcome.events[0] - outcome.start for outcome in outcomes]
        self.whole = [outcome.events[-1] - outcome.start for outcome in outcomes]
        gaps = [[b - a for a, b in zip(o.events, o.events[1:], strict=False)] for o in outcomes]
        self.between = [gap for of_one in gaps for gap in of_one]
        span = max(o.events[-1] for o in outcomes) - min(o.start for o in outcomes)
        # One event a token, if the server does not say how many there were.
        self.throughput = sum(o.tokens or len(o.events) for o in outcomes) / span
        good = [
            first <= FIRST_TOKEN_GOAL and statistics.fmean(of_one or [0.0]) <= BETWEEN_TOKENS_GOAL
            for first, of_one in zip(self.first, gaps, strict=True)
        ]
        self.goodput = sum(good) / span

    def latencies(self) -> dict[str, float]:
        named = {"first token": self.first, "between tokens": self.between, "whole answer": self.whole}
        return {
            f"{share:.0%} {name}": percentile(values, share)
            for name, values in named.items()
            if values
            for share in (0.5, 0.99)
        }


def compare(bench: Bench, case: str, ours: Times, peer: Times | None) -> None:
    def add(metric: str, unit: str, value: float, other: float | None) -> None:
        ratio = value / other if other else None
        bench.rows.append(
            Row(case, metric, value, unit, None, None, "llama.cpp server" if other else None, other, ratio)
        )
        print(
            f"{case:34s} {metric:28s} {value:10.2f} {unit:10s}", f"x {ratio:.2f} llama.cpp" if ratio else "", flush=True
        )

    add("throughput", "tokens/s", ours.throughput, peer.throughput if peer else None)
    add("goodput", "requests/s", ours.goodput, peer.goodput if peer else None)
    others = peer.latencies() if peer else {}
    for name, seconds in ours.latencies().items():
        add(f"1 / {name}", "1/s", 1 / seconds, 1 / others[name] if name in others else None)


def run(bench: Bench, folder: Path, threads: int, seconds: float, with_peer: bool) -> None:
    path = write_checkpoint(SHAPES[SHAPE], folder / SHAPE)
    if with_peer:
        from peers.gguf_models import write_gguf  # needs llama_cpp

        path = write_gguf(SHAPES[SHAPE], path, "BF16")
    with ExitStack() as stack:
        ours = stack.enter_context(start_ours(path, threads))
        peer = stack.enter_context(start_llama(path, threads)) if with_peer else None
        results: dict[tuple[str, int], Times] = {}
        cases: dict[str, Callable] = {
            f"{clients} client{'s' if clients > 1 else ''}": lambda server, c=clients: closed_loop(server, c, seconds)
            for clients in (1, 8)
        }
        cases["4 streams, a long prompt arrives"] = beside_a_long_prompt
        for case, load in cases.items():
            for server in filter(None, (ours, peer)):
                if case == "1 client":
                    asyncio.run(closed_loop(server, 1, 1.0))  # warm
                results[case, server.port] = Times(asyncio.run(load(server)))
            compare(bench, case, results[case, ours.port], results.get((case, peer.port)) if peer else None)
        eight, one = results["8 clients", ours.port].throughput, results["1 client", ours.port].throughput
    bench.rows.append(
        Row("8 clients against 1", "throughput", eight, "tokens/s", None, None, "1 client", one, eight / one)
    )
    print(f"8 clients: x {eight / one:.2f} of 1 client")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="of each case and server (default: 8)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-server", help="for the model"
    )
    parser.add_argument("--no-peer", action="store_true", help="without llama.cpp's server")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-server.json")
    arguments = parser.parse_args()
    with_peer = not arguments.no_peer
    if with_peer and importlib.util.find_spec("llama_cpp") is None:
        parser.error("llama-cpp-python[server] is not installed; --no-peer measures ours alone")
    bench = Bench("server", "cpu")
    if with_peer:
        import llama_cpp

        bench.versions["llama-cpp-python"] = llama_cpp.__version__
    run(bench, arguments.folder, arguments.threads, arguments.seconds, with_peer)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
