"""The way from the engine's thread to a client's socket.

1. What it costs the engine's thread to tell the event loop of one token of each of 128 requests, while a Python thread
   spins: a C++ thread plays the engine, with a step every 5 ms.
2. How many server-sent events a second one process sends over 32 streams, with an engine that always has a token.
3. How long a token takes from the engine's thread to the client, over 32 streams of 50 tokens a second each.
4. New tokens a second of 8 clients of a server, beside those of one ``generate()`` of the same prompts in process. The
   clients run in a process of their own on the same processors.
5. Steps of the engine a second while it streams to 8 clients whose answers must fit a JSON schema, beside steps for 8
   whose need not.

What is compared takes turns, and medians count.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import uvicorn
from torch.utils.cpp_extension import load

import mixtral
from common import REPOSITORY, Bench, Row
from mixtral.server.app import create_app
from mixtral.server.bridge import Bridge, Progress
from mixtral.server.lifecycle import Lifecycle
from mixtral.server.limits import Limits
from mixtral.server.run import Server, listen
from random_models import SHAPES, model_config

SEQUENCES, STEPS, STREAMS, SECONDS, PACED_STEPS = 128, 600, 32, 8.0, 300
CLIENTS, NEW_TOKENS, TURNS = 8, 64, 9
CASE = f"mini bfloat16, {CLIENTS} clients, {NEW_TOKENS} new tokens each"

# Of an answer that does not end within NEW_TOKENS.
PLACE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "coast": {"type": "boolean"}},
    "required": ["name", "size", "coast"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PLACE, "minItems": 100}


def engine_extension() -> ModuleType:
    source = Path(__file__).with_name("bridge_engine.cpp")
    return load("bench_bridge_engine", [str(source)], extra_cflags=["-O1"], with_cuda=False)  # as the Python module


def engine_seconds(spin: bool) -> list[float]:
    extension = engine_extension()
    box, taken, stop = extension.EventBox(), [], threading.Event()

    def spinner() -> None:
        while not stop.is_set():
            pass

    async def loop() -> list[float]:
        asyncio.get_running_loop().add_reader(box.fileno(), lambda: taken.extend(box.take()))
        return await asyncio.to_thread(extension.play, box, SEQUENCES, STEPS, 0.005)

    if spin:
        threading.Thread(target=spinner, daemon=True).start()
    try:
        seconds = asyncio.run(loop())
    finally:
        stop.set()
    taken.extend(box.take())
    assert sum(len(ids) for _, _, ids in taken) == SEQUENCES * STEPS
    return seconds


TOKEN = SimpleNamespace(text=" word", token_ids=[7], logprobs=[], prompt_logprobs=[], routed_experts=None, outcome=None)


class Endless(Bridge):
    """An engine that has a token for every open call in every turn of the event loop."""

    def __init__(self, model: mixtral.Mixtral, _: object) -> None:
        self._engine, self._open, self._next_key = model.engine, {}, 0
        self._feeder = asyncio.ensure_future(self._feed())

    def submit(self, _seat: object, key: int, *_: object) -> int:
        return key

    def cancel(self, ids: list[int]) -> None:
        pass

    def close(self) -> None:
        self._feeder.cancel()

    async def _feed(self) -> None:
        while True:
            for call, index in list(self._open.values()):
                call.push(index, Progress(TOKEN))
            await asyncio.sleep(0)


class Paced(Endless):
    """An engine whose thread has a token for every open call each 20 ms, with the time as its text."""

    async def _feed(self) -> None:
        while len(self._open) < STREAMS:
            await asyncio.sleep(0.01)
        calls = list(self._open.values())
        extension = engine_extension()
        box = extension.EventBox()

        def drain() -> None:
            for key, text, token_ids in box.take():
                call, index = calls[key]
                call.push(index, Progress(SimpleNamespace(**{**vars(TOKEN), "text": text, "token_ids": token_ids})))

        asyncio.get_running_loop().add_reader(box.fileno(), drain)
        await asyncio.to_thread(extension.play, box, STREAMS, PACED_STEPS, 0.02)


def serve(port: multiprocessing.Queue, engine: type[Bridge]) -> None:
    model = mixtral.Mixtral.from_config(model_config(SHAPES["mini"]))
    with listen("127.0.0.1", 0) as listener:
        server = Server(Lifecycle(Limits()))
        server.serve_on(
            listener, lambda: create_app(model, bridge=engine), lambda _: port.put(listener.getsockname()[1])
        )


async def ask(port: int, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The answer to a completion or a chat; a client that does as little as it can, as it runs on the server's
    processors."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    data = json.dumps(body).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    return reader, writer


async def events_per_second(port: int) -> float:
    counts = [0] * STREAMS

    async def read(index: int) -> None:
        reader, _writer = await ask(port, {"prompt": [1, 2], "max_tokens": 64, "stream": True})
        while chunk := await reader.read(2**18):
            counts[index] += chunk.count(b"data: ")

    tasks = [asyncio.create_task(read(index)) for index in range(STREAMS)]
    while not all(counts):
        await asyncio.sleep(0.05)
    before, start = sum(counts), time.perf_counter()
    await asyncio.sleep(SECONDS)
    rate = (sum(counts) - before) / (time.perf_counter() - start)
    for task in tasks:
        task.cancel()
    return rate


def milliseconds_to_clients(port: int) -> list[float]:
    """Of each token of ``Paced``, from the engine's thread until a client sees it."""
    body = json.dumps({"prompt": [1, 2], "max_tokens": 2 * PACED_STEPS, "stream": True})
    request = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request += f"Content-Length: {len(body)}\r\n\r\n{body}"
    selector, waits = selectors.DefaultSelector(), []
    for _ in range(STREAMS):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(request.encode())
        selector.register(client, selectors.EVENT_READ)
    while len(waits) < STREAMS * PACED_STEPS:
        for key, _ in selector.select(timeout=60):
            data = key.fileobj.recv(2**18)
            now = time.perf_counter_ns()
            waits += [(now - int(sent)) / 1e6 for sent in re.findall(rb'"text": ?"(\d+) "', data)]
    return waits


def server_process(engine: type[Bridge]) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(port, engine), daemon=True)
    process.start()
    try:
        yield port.get(timeout=120)
    finally:
        process.kill()


def stream_all(port: int, bodies: list[dict[str, object]]) -> tuple[float, float]:
    """Streams all answers at once. Seconds until they have ended, and the mean of a step: from first tokens to last."""

    async def one(body: dict[str, object]) -> float:
        reader, _writer = await ask(port, {**body, "max_tokens": NEW_TOKENS, "stream": True})
        times = []
        while b"[DONE]" not in (line := await reader.readline()):
            if b"data: " in line:
                times.append(time.perf_counter())
        return (times[-1] - times[0]) / (NEW_TOKENS - 1)

    async def together() -> tuple[float, float]:
        start = time.perf_counter()
        steps = await asyncio.gather(*map(one, bodies))
        return time.perf_counter() - start, statistics.median(steps)

    return asyncio.run(together())


@contextmanager
def clients_of(model: mixtral.Mixtral) -> Iterator[Callable[[list[dict[str, object]]], tuple[float, float]]]:
    """``stream_all``, from another process to a server of ``model`` in this one."""
    server = uvicorn.Server(uvicorn.Config(create_app(model), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        yield lambda bodies: clients.submit(stream_all, port, bodies).result(timeout=300)
    server.should_exit = True


def compare(bench: Bench, row: Row, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Completes ``row`` with the rates of functions that take turns and return rates."""
    rates: dict[Callable, list[float]] = {theirs: [], ours: []}
    for turn in range(1 + TURNS):
        for work, of_work in rates.items():
            rate = work()
            if turn:  # the first one warms up
                of_work.append(rate)
    row.value, row.peer_value = (statistics.median(rates[work]) for work in (ours, theirs))
    row.ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))  # of each turn
    bench.rows.append(row)
    print(
        f"{row.case}: {row.metric} {row.value:.1f} {row.unit} x {row.ratio:.3f} of {row.peer} {row.peer_value:.1f}",
        flush=True,
    )


def against_in_process(bench: Bench) -> None:
    model = mixtral.Mixtral.from_config(model_config(SHAPES["mini"]), dtype="bfloat16")
    prompts = [[1, *range(10 + i, 42 + i)] for i in range(CLIENTS)]
    bodies = [{"prompt": prompt, "temperature": 0, "ignore_eos": True} for prompt in prompts]

    def in_process() -> float:
        start = time.perf_counter()
        model.generate(prompts, NEW_TOKENS, ignore_eos=True)
        return CLIENTS * NEW_TOKENS / (time.perf_counter() - start)

    with clients_of(model) as stream:
        row = Row(CASE, "served", 0, "tokens/s", peer="in process")
        compare(bench, row, lambda: CLIENTS * NEW_TOKENS / stream(bodies)[0], in_process)


def against_no_grammar(bench: Bench) -> None:
    tokenizer = mixtral.Tokenizer(REPOSITORY / "models" / "demo")
    shape = replace(SHAPES["mini"], vocab=tokenizer.vocab_size)
    bare = mixtral.Mixtral.from_config(model_config(shape), dtype="bfloat16")
    model = mixtral.Mixtral(bare._model, tokenizer)
    chats = [{"messages": [{"role": "user", "content": f"Hi {i}"}], "seed": i} for i in range(CLIENTS)]
    form = {"type": "json_schema", "json_schema": {"name": "endless", "schema": ENDLESS}}
    with clients_of(model) as stream:
        compare(
            bench,
            Row(f"{CASE}, a JSON schema", "steps", 0, "1/s", peer="without"),
            lambda: 1 / stream([{**chat, "response_format": form} for chat in chats])[1],
            lambda: 1 / stream([{**chat, "ignore_eos": True} for chat in chats])[1],
        )


def engine_thread(bench: Bench) -> None:
    for spin in (False, True):
        milliseconds = sorted(1e3 * s for s in engine_seconds(spin))
        case = f"{SEQUENCES} sequences, Python {'spins' if spin else 'is idle'}"
        median, high = statistics.median(milliseconds), milliseconds[int(0.99 * len(milliseconds))]
        bench.rows.append(Row(case, "steps told of in a second of the engine's thread", 1e3 / median, "1/s"))
        print(f"{case:40s} {median:.4f} ms a step, 99 % below {high:.4f} ms", flush=True)


def events(bench: Bench) -> None:
    for port in server_process(Endless):
        rate = asyncio.run(events_per_second(port))
    bench.rows.append(Row(f"{STREAMS} streams", "server-sent events", rate, "1/s"))
    print(f"{STREAMS} streams: {rate:.0f} events/s", flush=True)


def to_clients(bench: Bench) -> None:
    for port in server_process(Paced):
        waits = sorted(milliseconds_to_clients(port)[STREAMS:])  # the first step warms up
    median, high = statistics.median(waits), waits[int(0.99 * len(waits))]
    case = f"{STREAMS} streams, 50 tokens a second each"
    bench.rows.append(Row(case, "engine's thread to client, median", median, "ms"))
    bench.rows.append(Row(case, "engine's thread to client, 99 % below", high, "ms"))
    print(f"{case}: engine's thread to client {median:.2f} ms, 99 % below {high:.2f} ms", flush=True)


PARTS = {
    "engine thread": engine_thread,
    "events": events,
    "to clients": to_clients,
    "in process": against_in_process,
    "grammar": against_no_grammar,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="one part alone; a record keeps the others (common.py)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-bridge.json")
    arguments = parser.parse_args()
    bench = Bench("bridge", "cpu")
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            part(bench)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
