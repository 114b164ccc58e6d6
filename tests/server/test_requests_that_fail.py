"""Requests that fail for a reason of their own: one error in the right form, their place is free, others go on."""

import json

import httpx
import pytest

from processes import small_server
from running import served, small_model
from soak import idle
from test_full_engine import SHORT, hold, release, start, waits

LONG = {"prompt": [5, 6], "max_tokens": 16000, "ignore_eos": True}


def events_of(text: str) -> list[str]:
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def test_nan_ends_its_own_request():
    model = small_model()
    with served(model) as url:

        def ask(prompt: list[int], stream: bool = False) -> httpx.Response:
            body = {"prompt": prompt, "max_tokens": 8, "logprobs": 2, "seed": 1, "stream": stream}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        before = ask([5, 6]).json()["choices"]
        model.named_parameters()["embed_tokens"][7] = float("nan")
        answer = ask([5, 7])
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "numerical_error")
        events = events_of(ask([5, 7], stream=True).text)
        assert json.loads(events[-1])["error"]["code"] == "numerical_error"
        assert "[DONE]" not in events
        assert ask([5, 6]).json()["choices"] == before
    assert model.engine.stats().seats_taken == model.engine.stats().pages_in_use == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_deadline_frees_the_place_of_what_runs(streamed: bool):
    with small_server(limits={"request_deadline": 1.0}, model={"max_position": 16384}) as server:
        answer = server.post("/v1/completions", {**LONG, "stream": streamed})
        if streamed:
            error = json.loads(answer.events()[-1])["error"]
            assert "[DONE]" not in answer.events()
        else:
            error = answer.error
            assert answer.status == 504
        assert error["code"] == "timeout"
        assert not any(idle(server).values())


def test_a_deadline_passes_while_a_request_waits():
    with small_server(limits={"request_deadline": 1.0}) as server:
        hold(server)
        waiting = start(server, SHORT)
        while waits(server) < 1:
            pass
        answer = waiting.answer()
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        release(server)
        assert not any(idle(server).values())
        assert server.post("/v1/completions", SHORT).status == 200


def test_what_can_never_fit_the_cache_is_refused():
    with served(small_model(kv_memory=1 << 16)) as url:
        body = {"prompt": [5] * 900, "max_tokens": 100}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in ("prompt", "max_tokens")
        assert httpx.post(f"{url}/v1/completions", json={**body, "prompt": [5]}, timeout=60).status_code == 200
