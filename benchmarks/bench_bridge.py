"""The way from the engine's thread to a client's socket.

1. What it costs the engine's thread to tell the event loop of one token of each of 128 requests, while a Python thread
   spins: a C++ thread plays the engine, with a step every 5 ms.
2. How many server-sent events a second one process sends over 32 streams, with an engine that always has a token.
3. New tokens a second of 8 clients of a server, beside those of one ``generate()`` of the same prompts in process. The
   clients run in a process of their own on the same processors.
"""

import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import uvicorn
from torch.utils.cpp_extension import load_inline

import mixtral
from common import REPOSITORY, Bench, Row, main
from mixtral.server.app import create_app
from mixtral.server.bridge import Bridge, Progress
from mixtral.server.lifecycle import Lifecycle
from mixtral.server.limits import Limits
from mixtral.server.run import Server, listen
from random_models import SHAPES, model_config

SEQUENCES, STEPS, STREAMS, SECONDS = 128, 600, 32, 8.0
CLIENTS, NEW_TOKENS, TURNS = 8, 64, 9

# A thread that does what the engine's does with the callbacks of its requests, and times it.
ENGINE = r"""
#include <chrono>
#include <thread>

#include "csrc/bindings/event_box.cpp"

namespace mixtral {

// -> seconds of each step.
std::vector<double> play(const std::shared_ptr<EventBox>& box, int64_t sequences, int64_t steps) {
  std::vector<Callbacks> callbacks;
  std::vector<Generation> generations(static_cast<size_t>(sequences));
  for (int64_t key = 0; key < sequences; ++key) callbacks.push_back(box->callbacks(key));
  const std::string text = " word";
  std::vector<double> seconds;
  for (int64_t step = 0; step < steps; ++step) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < generations.size(); ++i) {
      generations[i].token_ids.push_back(step);
      callbacks[i].on_progress({text, generations[i], static_cast<size_t>(step)});
    }
    box->wake();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

}  // namespace mixtral

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace mixtral;
  py::class_<EventBox, std::shared_ptr<EventBox>>(m, "EventBox", py::module_local())
      .def(py::init<>())
      .def("fileno", &EventBox::fd)
      .def("take", [](EventBox& box) {
        py::list events;
        for (Event& event : box.take()) events.append(py::make_tuple(event.key, event.text, event.token_ids));
        return events;
      });
  m.def("play", &play, py::call_guard<py::gil_scoped_release>());
}
"""


def engine_seconds(spin: bool) -> list[float]:
    extension = load_inline(
        "bench_bridge_engine",
        ENGINE,
        extra_include_paths=[str(REPOSITORY)],
        extra_cflags=["-O1"],  # as the Python module
        with_cuda=False,
    )
    box, taken, stop = extension.EventBox(), [], threading.Event()

    def spinner() -> None:
        while not stop.is_set():
            pass

    async def loop() -> list[float]:
        asyncio.get_running_loop().add_reader(box.fileno(), lambda: taken.extend(box.take()))
        return await asyncio.to_thread(extension.play, box, SEQUENCES, STEPS)

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

    def __init__(self, _: mixtral.Mixtral, seats: int, metrics: object) -> None:
        self._open, self._next_key, self._seats, self.seats_taken = {}, 0, seats, 0
        self._feeder = asyncio.ensure_future(self._feed())

    def submit(self, key: int, *_: object) -> int:
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


def serve(port: multiprocessing.Queue) -> None:
    model = mixtral.Mixtral.from_config(model_config(SHAPES["mini"]))
    with listen("127.0.0.1", 0) as listener:
        server = Server(Lifecycle(Limits()))
        server.serve_on(
            listener, lambda: create_app(model, bridge=Endless), lambda _: port.put(listener.getsockname()[1])
        )


async def ask(port: int, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The answer to a completion; a client that does as little as it can, as it runs on the server's processors."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
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


def server_process() -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(port,), daemon=True)
    process.start()
    try:
        yield port.get(timeout=120)
    finally:
        process.kill()


def stream_all(port: int, prompts: list[list[int]]) -> float:
    """Seconds until all prompts have streamed their answers."""

    async def one(prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        reader, _writer = await ask(port, body)
        await reader.readuntil(b"[DONE]")

    async def together() -> float:
        start = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        return time.perf_counter() - start

    return asyncio.run(together())


def against_in_process(bench: Bench) -> None:
    model = mixtral.Mixtral.from_config(model_config(SHAPES["mini"]), dtype="bfloat16")
    prompts = [[1, *range(10 + i, 42 + i)] for i in range(CLIENTS)]
    server = uvicorn.Server(uvicorn.Config(create_app(model), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    rates: dict[str, list[float]] = {"in process": [], "server": []}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        for turn in range(1 + TURNS):
            start = time.perf_counter()
            model.generate(prompts, NEW_TOKENS, ignore_eos=True)
            seconds = {"in process": time.perf_counter() - start}
            seconds["server"] = clients.submit(stream_all, port, prompts).result(timeout=120)
            for who in rates if turn else ():  # the first turn warms up
                rates[who].append(CLIENTS * NEW_TOKENS / seconds[who])
    server.should_exit = True
    alone, served = (statistics.median(rates[who]) for who in ("in process", "server"))
    case = f"mini bfloat16, {CLIENTS} clients, {NEW_TOKENS} new tokens each"
    ratio = statistics.median(b / a for a, b in zip(rates["in process"], rates["server"], strict=True))  # of each turn
    bench.rows.append(Row(case, "served", served, "tokens/s", peer="in process", peer_value=alone, ratio=ratio))
    print(f"{case}: {served:.1f} tokens/s x {ratio:.3f} of in process {alone:.1f}", flush=True)


def run(bench: Bench) -> None:
    for spin in (False, True):
        milliseconds = sorted(1e3 * s for s in engine_seconds(spin))
        case = f"{SEQUENCES} sequences, Python {'spins' if spin else 'is idle'}"
        median, high = statistics.median(milliseconds), milliseconds[int(0.99 * len(milliseconds))]
        bench.rows.append(Row(case, "steps told of in a second of the engine's thread", 1e3 / median, "1/s"))
        print(f"{case:40s} {median:.4f} ms a step, 99 % below {high:.4f} ms", flush=True)
    for port in server_process():
        rate = asyncio.run(events_per_second(port))
    bench.rows.append(Row(f"{STREAMS} streams", "server-sent events", rate, "1/s"))
    print(f"{STREAMS} streams: {rate:.0f} events/s", flush=True)
    against_in_process(bench)


if __name__ == "__main__":
    main("bridge", run, devices=("cpu",))
