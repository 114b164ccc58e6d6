"""mixtral.Engine: requests that are submitted one by one, and called off."""

import threading
from concurrent.futures import TimeoutError, as_completed

import pytest

import mixtral
from python_models import demo_model


@pytest.fixture
def demo() -> mixtral.Mixtral:
    return demo_model()


def test_requests_answer_as_generate_does(demo):
    prompts = ["Once", "In the beginning", demo.tokenizer.encode("And it came to pass", add_bos=True)]
    expected = demo.generate(prompts, max_tokens=12, temperature=0.8, seed=3)
    engine = mixtral.Engine(demo, max_batch=2)  # the third waits for a place
    requests = [engine.submit(prompt, max_tokens=12, temperature=0.8, seed=3) for prompt in prompts]
    assert len(list(as_completed(requests))) == 3
    for request, generation in zip(requests, expected, strict=True):
        out = request.result()
        assert (out.text, out.token_ids, out.finish_reason) == (generation.text, generation.token_ids, "length")


def test_text_arrives_while_a_request_runs(demo):
    pieces = []
    out = mixtral.Engine(demo).submit("Once", max_tokens=8, on_text=pieces.append).result()
    assert len(pieces) > 1 and all(pieces) and "".join(pieces) == out.text


def test_abort_ends_one_request_and_no_other(demo):
    engine = mixtral.Engine(demo)
    started, go = threading.Event(), threading.Event()

    def hold(text: str) -> None:
        started.set()
        assert go.wait(60)

    long = engine.submit("Once", max_tokens=2000, ignore_eos=True, on_text=hold)
    other = engine.submit("Once", max_tokens=8)
    assert started.wait(60)
    with pytest.raises(TimeoutError):
        long.result(timeout=0)
    engine.abort(long)
    go.set()
    out = long.result(timeout=60)
    assert out.finish_reason == "cancelled" and len(out.token_ids) < 2000
    assert other.result(timeout=60).text == demo.generate("Once", max_tokens=8)[0].text
    engine.abort(other)  # it has ended: no effect
    assert other.result().finish_reason == "length"


def test_error_of_on_text_ends_its_request(demo):
    def fail(text: str) -> None:
        raise KeyError(text)

    engine = mixtral.Engine(demo)
    request = engine.submit("Once", max_tokens=8, on_text=fail)
    other = engine.submit("Once", max_tokens=8)
    assert isinstance(request.exception(timeout=60), KeyError)
    assert other.result(timeout=60).finish_reason == "length"


def test_a_request_outlives_the_name_of_its_engine(demo):
    assert mixtral.Engine(demo).submit("Once", max_tokens=8).result(timeout=60).finish_reason == "length"


def test_wrong_requests_raise_at_once(demo):
    engine = mixtral.Engine(demo)
    for prompt, options, message in [
        ("Once", {"max_tokens": 0}, "max_tokens must be >= 1"),
        ("Once", {"experts_per_token": 0}, "experts_per_token must be >= 1"),
        ([], {}, "prompt must not be empty"),
        ([99999], {}, "token ids must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, **options)
    with pytest.raises(TypeError, match="max_token"):
        engine.submit("Once", max_token=3)
    with pytest.raises(TypeError, match="max_batches"):
        mixtral.Engine(demo, max_batches=3)


def test_a_full_engine_refuses(demo):
    engine = mixtral.Engine(demo, max_queue=1)
    started, go = threading.Event(), threading.Event()

    def hold(text: str) -> None:
        started.set()
        assert go.wait(60)

    first = engine.submit("Once", max_tokens=4, on_text=hold)
    assert started.wait(60)
    try:
        with pytest.raises(mixtral.QueueFull):
            engine.submit("Once", max_tokens=4)
    finally:
        go.set()
    assert first.result(timeout=60).finish_reason == "length"
