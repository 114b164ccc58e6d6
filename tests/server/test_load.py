"""Many requests at once with faults among them: each ends as it would alone, and nothing is left behind."""

import asyncio
import json
import signal
import threading
from types import SimpleNamespace

import pytest

from http_load import Client
from mixtral.server.metrics import Metrics, Stats
from processes import ServerProcess, small_server
from soak import idle, settled_descriptors, soak

pytest_plugins = ["operations_fixtures"]


def test_load_with_faults(small: ServerProcess) -> None:
    descriptors = small.descriptors()
    report = asyncio.run(soak(small, requests=400, connections=16))
    assert report.lost == []
    assert sum(report.outcomes.values()) == 400
    assert sum(report.canaries.values()) > 20
    assert len(report.canaries) == 1
    assert not any(idle(small).values())
    assert settled_descriptors(small, descriptors) <= descriptors


def test_a_burst_beyond_the_queue() -> None:
    """As many as there are seats are answered, the others get 429 at once; no seat is lost."""

    async def burst(server: ServerProcess, count: int) -> list[int]:
        body = {"prompt": [5] * 8, "max_tokens": 200, "ignore_eos": True}
        clients = [Client(server.host, server.port) for _ in range(count)]
        outcomes = await asyncio.gather(*(client.post(body) for client in clients))
        for client in clients:
            client.close()
        return [outcome.status for outcome in outcomes]

    with small_server(model={"max_queue": 16}) as server:
        for _ in range(2):
            statuses = asyncio.run(burst(server, 200))
            assert set(statuses) == {200, 429}
            assert statuses.count(200) >= 16
        answer = server.post("/v1/completions", {"prompt": [5], "n": 17 // 2, "max_tokens": 1})
        assert answer.status == 200


def test_sigterm_under_load(tmp_path: object) -> None:
    """Streams that run go on to [DONE] with a real engine too, and the process ends with 0."""
    with small_server() as server:
        streams = []
        for _ in range(16):
            connection = server.connect()
            body = {"prompt": [5, 6], "max_tokens": 300, "ignore_eos": True, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body).encode())
            assert connection.head()[0] == 200
            streams.append(connection)
        ends: list[bytes] = []

        def read(connection) -> None:
            last = b""
            while chunk := connection.chunk():
                last = chunk
            ends.append(last)

        readers = [threading.Thread(target=read, args=(connection,)) for connection in streams]
        for reader in readers:
            reader.start()
        server.process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join(60)
        assert len(ends) == 16
        assert all(end.endswith(b"data: [DONE]\n\n") for end in ends)
        assert server.wait() == 0


@pytest.mark.parametrize("arrivals", [[1, 1, 1, 1], [2, 1, 1], [1, 3], [4]])
def test_every_token_but_the_first_has_waited(arrivals: list[int]) -> None:
    """However many tokens the server hears of at once."""
    stats = SimpleNamespace(**dict.fromkeys(Stats.__annotations__, 0))
    metrics = Metrics("model", SimpleNamespace(stats=lambda: stats, routing_counts=lambda: None))
    sequence = metrics.sequence(prompt_tokens=1, max_tokens=4)
    for new_tokens in [0, *arrivals]:
        sequence.progress(new_tokens)
    lines = metrics.text().decode().splitlines()
    (waits,) = (line for line in lines if line.startswith("mixtral:inter_token_latency_seconds_count"))
    assert float(waits.rpartition(" ")[2]) == 3


def test_metrics_count_what_happened() -> None:
    with small_server() as server:
        for _ in range(3):
            server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "n": 2})
        server.post("/v1/completions", {"prompt": "", "max_tokens": 4})
        lines = server.get("/metrics").body.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = 'engine="0",model_name="small"'
    counted = {
        f"mixtral:prompt_tokens_total{{{labels}}}": 18,
        f"mixtral:generation_tokens_total{{{labels}}}": 24,
        'mixtral:request_success_total{engine="0",finished_reason="length",model_name="small"}': 6,
        f"mixtral:time_to_first_token_seconds_count{{{labels}}}": 6,
        f"mixtral:inter_token_latency_seconds_count{{{labels}}}": 18,
        f"mixtral:request_generation_tokens_sum{{{labels}}}": 24,
        f"mixtral:num_requests_running{{{labels}}}": 0,
        f"mixtral:num_requests_waiting{{{labels}}}": 0,
        f"mixtral:kv_cache_usage_perc{{{labels}}}": 0,
    }
    assert {name: float(values[name]) for name in counted} == counted
    experts = [float(value) for name, value in values.items() if name.startswith("mixtral:expert_tokens_total")]
    assert len(experts) == 2 * 4  # layers, experts
    # Every token but the last of each sequence is read by both layers, by 2 experts each.
    assert sum(experts) == 2 * 2 * (18 + 24 - 6)
