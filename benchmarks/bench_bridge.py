"""The way from the engine's thread to a client's socket, without a model.

1. What it costs the engine's thread to tell the event loop of one token of each of 128 requests, while a Python thread
   spins: a C++ thread plays the engine, with a step every 5 ms.
2. How many server-sent events a second one process sends over 32 streams, with an engine that always has a token.
"""

import asyncio
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import uvicorn
from torch.utils.cpp_extension import load_inline

import mixtral
from common import REPOSITORY, Bench, Row, main
from mixtral.server.app import create_app
from mixtral.server.bridge import Bridge, Progress
from random_models import SHAPES, model_config

SEQUENCES, STEPS, STREAMS, SECONDS = 128, 600, 32, 8.0

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
  py::class_<EventBox, std::shared_ptr<EventBox>>(m, "EventBox")
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
    extension = load_inline("bench_bridge_engine", ENGINE, extra_include_paths=[str(REPOSITORY)], with_cuda=False)
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
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(mixtral.Mixtral.from_config(model_config(SHAPES["mini"])), bridge=Endless)
    port.put(listener.getsockname()[1])
    uvicorn.run(app, fd=listener.fileno(), log_level="warning", access_log=False)


async def events_per_second(port: int) -> float:
    body = b'{"prompt": [1, 2], "max_tokens": 64, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    counts = [0] * STREAMS

    async def read(index: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        writer.write(head % len(body) + body)
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


if __name__ == "__main__":
    main("bridge", run, devices=("cpu",))
