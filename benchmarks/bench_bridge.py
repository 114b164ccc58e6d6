"""The way from the engine's thread to a client's socket.

1. What it costs the engine's thread to tell the event loop of one token of each of 128 requests, while a Python thread
   spins: a C++ thread plays the engine, with a step every 5 ms.
2. How many server-sent events a second one process sends over 32 streams, with an engine that always has a token.
3. New tokens a second of 8 clients of a server, beside those of one ``generate()`` of the same prompts in process. The
   clients run in a process of their own on the same processors.
4. The same of 8 clients whose answers must fit a JSON schema, beside the same without.
"""

import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
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

# Of an answer that does not end within NEW_TOKENS.
PLACE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "coast": {"type": "boolean"}},
    "required": ["name", "size", "coast"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PLACE, "minItems": 100}

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


def serve(port: multiprocessing.Queue) -> None:
    model = mixtral.Mixtral.from_config(model_config(SHAPES["mini"]))
    with listen("127.0.0.1", 0) as listener:
        server = Server(Lifecycle(Limits()))
        server.serve_on(
            listener, lambda: create_app(model, bridge=Endless), lambda _: port.put(listener.getsockname()[1])
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


def server_process() -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(port,), daemon=True)
    process.start()
    try:
        yield port.get(timeout=120)
    finally:
        process.kill()


def stream_all(port: int, bodies: list[dict[str, object]]) -> float:
    """Seconds until all have streamed their answers."""

    async def one(body: dict[str, object]) -> None:
        reader, _writer = await ask(port, {**body, "max_tokens": NEW_TOKENS, "stream": True})
        await reader.readuntil(b"[DONE]")

    async def together() -> float:
        start = time.perf_counter()
        await asyncio.gather(*map(one, bodies))
        return time.perf_counter() - start

    return asyncio.run(together())


@contextmanager
def clients_of(model: mixtral.Mixtral) -> Iterator[Callable[[list[dict[str, object]]], float]]:
    """``stream_all``, from another process to a server of ``model`` in this one."""
    server = uvicorn.Server(uvicorn.Config(create_app(model), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        yield lambda bodies: clients.submit(stream_all, port, bodies).result(timeout=300)
    server.should_exit = True


def compare(bench: Bench, metric: str, peer: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Of functions that take turns and return seconds for the same number of tokens."""
    rates: dict[Callable, list[float]] = {theirs: [], ours: []}
    for turn in range(1 + TURNS):
        for work, of_work in rates.items():
            seconds = work()
            if turn:  # the first one warms up
                of_work.append(CLIENTS * NEW_TOKENS / seconds)
    value, peer_value = (statistics.median(rates[work]) for work in (ours, theirs))
    ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))  # of each turn
    case = f"mini bfloat16, {CLIENTS} clients, {NEW_TOKENS} new tokens each"
    bench.rows.append(Row(case, metric, value, "tokens/s", peer=peer, peer_value=peer_value, ratio=ratio))
    print(f"{case}: {metric} {value:.1f} tokens/s x {ratio:.3f} of {peer} {peer_value:.1f}", flush=True)


def against_in_process(bench: Bench) -> None:
    model = mixtral.Mixtral.from_config(model_config(SHAPES["mini"]), dtype="bfloat16")
    prompts = [[1, *range(10 + i, 42 + i)] for i in range(CLIENTS)]
    bodies = [{"prompt": prompt, "temperature": 0, "ignore_eos": True} for prompt in prompts]

    def in_process() -> float:
        start = time.perf_counter()
        model.generate(prompts, NEW_TOKENS, ignore_eos=True)
        return time.perf_counter() - start

    with clients_of(model) as stream:
        compare(bench, "served", "in process", lambda: stream(bodies), in_process)


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
            "served with a JSON schema",
            "without",
            lambda: stream([{**chat, "response_format": form} for chat in chats]),
            lambda: stream([{**chat, "ignore_eos": True} for chat in chats]),
        )


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
    against_no_grammar(bench)


if __name__ == "__main__":
    main("bridge", run, devices=("cpu",))
