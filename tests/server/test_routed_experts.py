"""``return_routed_experts`` over HTTP, the totals of all requests, and ``serve --trace``."""

import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch

import mixtral
from mixtral.server.routing import RoutedTokens, layer_load
from running import served, small_model

pytest_plugins = ["server_fixtures"]
PROMPT = "In the beginning God created the heaven and the earth."
CHAT = [{"role": "user", "content": "Hello"}]


def post(url: str, path: str, **body: object) -> urllib.request.Request:
    body = {"max_tokens": 9, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(url + path, json.dumps(body).encode(), headers)


def ask(url: str, path: str, **body: object) -> list[dict]:
    with urllib.request.urlopen(post(url, path, **body), timeout=60) as response:
        return json.load(response)["choices"]


def stream(url: str, path: str, **body: object) -> list[dict]:
    """The choices of all chunks."""
    choices = []
    with urllib.request.urlopen(post(url, path, stream=True, **body), timeout=60) as response:
        for line in response:
            if line.startswith(b"data: {"):
                choices += json.loads(line[6:])["choices"]
    return choices


def stats(url: str) -> dict:
    with urllib.request.urlopen(url + "/v1/routing/stats", timeout=60) as response:
        return json.load(response)


def joined(choices: list[dict], index: int = 0) -> dict[str, list]:
    mine = [choice for choice in choices if choice["index"] == index]
    names = ("token_ids", "routed_experts", "routed_weights", "routed_tokens")
    return {name: sum((choice.get(name, []) for choice in mine), []) for name in names}


PATHS = [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": CHAT})]


@pytest.mark.parametrize("path, question", PATHS)
@pytest.mark.parametrize("k", [None, 1, 3])
def test_rows_are_those_of_a_trace_of_the_same_tokens(server_model, server_url, path, question, k):
    [choice] = ask(server_url, path, return_routed_experts=True, experts_per_token=k, **question)
    prompt = [token["id"] for token in choice["routed_tokens"] if token["prompt"]]
    expected = server_model.tokenizer.encode(PROMPT, True) if "prompt" in question else None
    expected = expected or server_model.tokenizer.apply_chat(CHAT)
    assert prompt == expected
    read = prompt + choice["token_ids"][:-1]  # nothing read the newest token
    assert [token["id"] for token in choice["routed_tokens"]] == read
    trace = server_model.trace(read, experts_per_token=k)
    assert torch.equal(torch.tensor(choice["routed_experts"], dtype=torch.uint8), trace.topk_ids)
    assert torch.equal(torch.tensor(choice["routed_weights"], dtype=torch.float16), trace.topk_weights)


@pytest.mark.parametrize("path, question", PATHS)
def test_a_stream_gives_the_same_rows_piece_by_piece(server_url, path, question):
    options = dict(return_routed_experts=True, n=2, temperature=1.0, seed=3, **question)
    chunks = stream(server_url, path, **options)
    for whole in ask(server_url, path, **options):
        pieces = joined(chunks, whole["index"])
        assert pieces == {name: whole[name] for name in pieces}
        assert len(pieces["routed_experts"]) > len(pieces["token_ids"])


def test_rows_are_told_as_they_come_and_each_once():
    def progress(rows: int, *token_ids: int) -> SimpleNamespace:
        experts = [torch.full((rows, 2, 1), rows)] if rows else []
        return SimpleNamespace(token_ids=[*token_ids], outcome=None, routed_experts=experts, routed_weights=experts)

    routed = RoutedTokens([5, 6], texts=None)
    told = []
    for new in ([progress(2, 7)], [progress(1, 8), progress(1, 9)], [progress(0)]):
        for each in new:
            routed.add(each)
        told.append(routed.take())
    assert [len(fields["routed_experts"]) for fields in told] == [2, 2, 0]
    tokens = [(token["id"], token["prompt"]) for fields in told for token in fields["routed_tokens"]]
    assert tokens == [(5, True), (6, True), (7, False), (8, False)]
    assert told[1]["routed_weights"] == told[1]["routed_experts"] == [[[1], [1]], [[1], [1]]]


def test_an_answer_that_ends_by_itself_has_a_row_for_every_token(server_url, server_model):
    """The row of the last token comes of the pass that gave the end-of-sequence token."""
    options = dict(prompt=[5, 6, 7], ignore_eos=False, return_routed_experts=True, temperature=2.0, max_tokens=900)
    for seed in range(200):
        [choice] = ask(server_url, "/v1/completions", seed=seed, **options | {"return_routed_experts": False})
        if choice["finish_reason"] == "stop":
            break
    assert choice["finish_reason"] == "stop"
    pieces = joined(stream(server_url, "/v1/completions", seed=seed, **options))
    assert [token["id"] for token in pieces["routed_tokens"]] == [5, 6, 7, *pieces["token_ids"]]


def test_the_bytes_of_the_tokens_are_the_text(server_url):
    [choice] = ask(server_url, "/v1/completions", prompt=PROMPT, return_routed_experts=True)
    tokens = choice["routed_tokens"]
    asked = b"".join(bytes(token["bytes"]) for token in tokens if token["prompt"])
    said = b"".join(bytes(token["bytes"]) for token in tokens if not token["prompt"])
    assert asked.decode().strip() == PROMPT and tokens[0]["bytes"] == []  # BOS is no text
    assert choice["text"].encode().startswith(said[:3])


def test_nothing_is_told_unless_it_is_asked_for(server_url):
    [choice] = ask(server_url, "/v1/completions", prompt=PROMPT)
    assert not [name for name in choice if name.startswith("routed")]


def test_totals_grow_by_the_tokens_that_were_read(server_url):
    before = stats(server_url)
    assert (before["num_experts"], before["experts_per_token"], len(before["layers"])) == (4, 2, 2)
    [choice] = ask(server_url, "/v1/completions", prompt=PROMPT, return_routed_experts=True)
    ask(server_url, "/v1/completions", prompt="Other")
    after = stats(server_url)
    rows = torch.tensor(choice["routed_experts"])
    assert after["tokens"] - before["tokens"] > len(rows)
    for layer in range(2):
        grown = torch.tensor(after["layers"][layer]["chosen"]) - torch.tensor(before["layers"][layer]["chosen"])
        mine = rows[:, layer].flatten().bincount(minlength=4)
        assert (grown >= mine).all() and grown.sum() == 2 * (after["tokens"] - before["tokens"])
        assert sum(after["layers"][layer]["first"]) == after["tokens"]


def test_measures_of_balance():
    even = layer_load([1, 1], [2, 2])
    assert (even["entropy"], even["jain"], even["max_violation"]) == (1.0, 1.0, 0.0)
    one = layer_load([3, 0], [3, 0])
    assert (one["entropy"], one["jain"], one["max_violation"]) == (0.0, 0.5, 1.0)
    assert layer_load([0, 0], [0, 0])["jain"] is None


def test_a_model_without_experts_says_so():
    model = mixtral.Mixtral.from_config(
        mixtral.Config(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
                       vocab_size=64, max_position=64, num_experts=0, top_k=0, rms_norm_eps=1e-5, rope_theta=1e4)
    )  # fmt: skip
    with served(model) as url:
        assert stats(url)["tokens"] is None and stats(url)["layers"] == []
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, "/v1/completions", prompt=[1, 2], return_routed_experts=True)
        assert refused.value.code == 400 and b"the model has no experts" in refused.value.read()
        with pytest.raises(ValueError, match="no experts"), served(model, trace="t"):
            pass


def test_a_trace_holds_all_requests_when_the_server_has_ended(tmp_path):
    model, path = small_model(), tmp_path / "t.safetensors"
    with served(model, trace=str(path)) as url:
        first = ask(url, "/v1/completions", prompt=PROMPT, return_routed_experts=True)[0]
        second = ask(url, "/v1/completions", prompt="And", temperature=1, seed=1)[0]
        ask(url, "/v1/completions", prompt="Another k", experts_per_token=1)
        assert "routed_experts" not in second and not path.exists()
    trace = mixtral.Trace.load(path)
    read = [token["id"] for token in first["routed_tokens"]]
    then = model.tokenizer.encode("And", True) + second["token_ids"][:-1]
    assert trace.token_ids.tolist() == read + then
    assert trace.docs.tolist() == [0] * len(read) + [1] * len(then)
    assert trace.positions.tolist() == [*range(len(read)), *range(len(then))]
    assert trace.special.nonzero().flatten().tolist() == [0, len(read)]
    expected = model.trace([read, then])
    assert torch.equal(trace.topk_ids, expected.topk_ids) and torch.equal(trace.topk_weights, expected.topk_weights)
    assert (trace.model, trace.tokenizer) == (expected.model, expected.tokenizer)
    assert torch.equal(model.replay(trace), model.replay(expected))


def test_a_trace_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"), served(small_model(), trace=str(tmp_path / "no" / "t")):
        pass


def other_experts(path, tokens: slice) -> torch.Tensor:
    """Changes the experts of these tokens of the trace, in every layer, and returns them."""
    trace = mixtral.Trace.load(path)
    trace.topk_ids[tokens] = 3 - trace.topk_ids[tokens]
    trace.save(path)
    return trace.topk_ids[tokens]


def sets(experts: list | torch.Tensor) -> list:
    return torch.as_tensor(experts).sort().values.tolist()


def test_requests_of_the_trace_go_to_its_experts_and_others_run_free(tmp_path):
    model, path = small_model(), tmp_path / "t.safetensors"
    options = dict(return_routed_experts=True, logprobs=1)
    with served(model, trace=str(path)) as url:
        first, other = (ask(url, "/v1/completions", prompt=text, **options) for text in (PROMPT, "And"))
        chat = ask(url, "/v1/chat/completions", messages=CHAT, return_routed_experts=True)
        free = ask(url, "/v1/completions", prompt="So", **options)
        ask(url, "/v1/completions", prompt="So", max_tokens=1, experts_per_token=3)
    with served(model, replay=str(path)) as url:  # the traced run, bit for bit
        assert ask(url, "/v1/completions", prompt=PROMPT, **options) == first
    begin = len(first[0]["routed_tokens"])
    changed = other_experts(path, slice(begin, begin + 2))  # BOS and "And"
    with served(model, replay=str(path)) as url:
        assert ask(url, "/v1/completions", prompt=PROMPT, **options) == first
        assert ask(url, "/v1/chat/completions", messages=CHAT, return_routed_experts=True) == chat
        for choice in ask(url, "/v1/completions", prompt=["And", "And"], n=2, **options):
            assert sets(choice["routed_experts"][:2]) == sets(changed) != sets(other[0]["routed_experts"][:2])
            assert choice["logprobs"] != other[0]["logprobs"]
        assert ask(url, "/v1/completions", prompt="So", experts_per_token=2, **options) == free
        [three] = ask(url, "/v1/completions", prompt="And", experts_per_token=3, **options)
        assert sets(three["routed_experts"]) != sets(changed) and len(three["routed_experts"][0][0]) == 3


def test_a_request_runs_free_from_where_it_leaves_the_trace(tmp_path):
    model, path = small_model(), tmp_path / "t"
    ids = model.tokenizer.encode(PROMPT, True)
    model.trace(ids[:5]).save(path)
    changed = other_experts(path, slice(0, 5))
    with served(model, replay=str(path)) as url:
        [longer] = ask(url, "/v1/completions", prompt=ids, return_routed_experts=True)
        [another] = ask(url, "/v1/completions", prompt=[*ids[:4], ids[4] + 1], return_routed_experts=True)
    assert sets(longer["routed_experts"][:5]) == sets(changed)
    trace = model.trace([token["id"] for token in longer["routed_tokens"]])
    trace.topk_ids = torch.tensor(longer["routed_experts"], dtype=torch.uint8)
    answer = model.replay(trace)[len(ids) - 1 :].argmax(1).tolist()
    assert longer["token_ids"] == answer
    assert another["routed_experts"] == model.trace([t["id"] for t in another["routed_tokens"]]).topk_ids.tolist()


def test_a_trace_that_cannot_be_replayed_is_refused(tmp_path):
    model, path = small_model(), tmp_path / "t"
    for file, reason in ((tmp_path / "none", "none"), (path, "is a trace of another model")):
        small_model(max_position=64).trace([1, 2, 3]).save(path)
        with pytest.raises(mixtral.LoadError, match=reason), served(model, replay=str(file)):
            pass
