"""Clients that go away: what they asked for ends, and nobody else notices."""

import time

import httpx
import openai
import pytest

from mixtral.server.app import create_app
from mixtral.server.settings import Settings
from running import running, small_model

LONG = {"model": "mixtral", "prompt": "Once", "max_tokens": 16000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server():
    """(URL, the bridge) of a server of its own: it counts what runs."""
    app = create_app(small_model(max_position=16384, max_batch=2), Settings(queue=4))
    with running(app) as url:
        yield url, app.state.served.bridge


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def test_a_stream_that_is_closed_ends_its_request(server, client):
    _, bridge = server
    stream = client.completions.create(stream=True, **LONG)
    next(iter(stream))
    assert bridge.seats_taken == 1
    stream.close()
    wait_until(lambda: bridge.seats_taken == 0)


def test_a_timeout_of_the_client_ends_its_request(server, client):
    _, bridge = server
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**LONG)
    wait_until(lambda: bridge.seats_taken == 0)


def test_requests_beyond_the_queue_are_refused_at_once(server, client):
    url, bridge = server
    streams = [client.completions.create(stream=True, **LONG) for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(**LONG)
    assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(n=5, **LONG)
    assert httpx.get(f"{url}/version").status_code == 200
    for stream in streams:
        stream.close()
    wait_until(lambda: bridge.seats_taken == 0)
    assert client.completions.create(model="mixtral", prompt="Once", max_tokens=2).choices[0].text


def test_the_neighbours_of_a_request_that_ends_go_on(server, client):
    _, bridge = server
    options = {"model": "mixtral", "prompt": "Twice", "max_tokens": 200, "seed": 1, "extra_body": {"ignore_eos": True}}
    alone = client.completions.create(**options).choices[0].text
    kept = client.completions.create(stream=True, **options)
    text = next(iter(kept)).choices[0].text
    for _ in range(3):
        gone = client.completions.create(stream=True, **LONG)
        next(iter(gone))
        gone.close()
    text += "".join(chunk.choices[0].text for chunk in kept)
    assert text == alone
    wait_until(lambda: bridge.seats_taken == 0)
