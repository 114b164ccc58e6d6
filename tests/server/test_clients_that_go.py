"""Clients that go away: what they asked for ends, and nobody else notices."""

import time

import httpx
import openai
import pytest

from running import served, small_model

LONG = {"model": "mixtral", "prompt": "Once", "max_tokens": 16000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server():
    """(URL, the engine) of a server of its own: it counts what runs."""
    model = small_model(max_position=16384, max_batch=2, max_queue=4)
    with served(model) as url:
        yield url, model.engine


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
    _, engine = server
    stream = client.completions.create(stream=True, **LONG)
    next(iter(stream))
    assert engine.stats().seats_taken == 1
    stream.close()
    wait_until(lambda: engine.stats().seats_taken == 0)


def test_a_timeout_of_the_client_ends_its_request(server, client):
    _, engine = server
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**LONG)
    wait_until(lambda: engine.stats().seats_taken == 0)


def test_requests_beyond_the_queue_are_refused_at_once(server, client):
    url, engine = server
    streams = [client.completions.create(stream=True, **LONG) for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(**LONG)
    assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(n=5, **LONG)
    assert httpx.get(f"{url}/version").status_code == 200
    for stream in streams:
        stream.close()
    wait_until(lambda: engine.stats().seats_taken == 0)
    assert client.completions.create(model="mixtral", prompt="Once", max_tokens=2).choices[0].text


def test_two_servers_of_one_model_share_its_places():
    model = small_model(max_queue=1)
    body = {"prompt": [5, 6], "max_tokens": 6, "temperature": 0}
    with served(model) as one, served(model) as other:
        seat = model.engine.reserve_seats(1)
        statuses = [httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code for url in (one, other)]
        assert statuses == [429, 429]
        del seat
        texts = [
            httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"] for url in (one, other, one)
        ]
        assert texts[0] == texts[1] == texts[2]


def test_the_neighbours_of_a_request_that_ends_go_on(server, client):
    _, engine = server
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
    wait_until(lambda: engine.stats().seats_taken == 0)
