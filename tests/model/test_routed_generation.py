"""Generation with its routing, and with another number of experts."""

import threading

import pytest
import torch

import mixtral
from checkpoints import TINY, random_model
from python_models import tiny_config, tiny_model

PROMPTS = [list(range(3, 24)), [40, 41], list(range(60, 70))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = random_model(num_local_experts=4, num_experts_per_tok=2, sliding_window=6)
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.mark.parametrize("chunk_size", [5, 512])
def test_routed_experts_are_those_of_a_trace_of_the_same_tokens(chunk_size, device):
    model = mixtral.Mixtral.from_config(tiny_config(), device=device, chunk_size=chunk_size)
    results = model.generate(PROMPTS, max_tokens=12, return_routed_experts=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        newest = result.finish_reason == "length"  # the model never read it
        read = prompt + (result.token_ids[:-1] if newest else result.token_ids)
        assert result.routed_experts.shape == (len(read), 2, 2)
        assert torch.equal(result.routed_experts, model.trace(read).topk_ids)


def test_recording_changes_nothing_and_is_off_unless_asked_for():
    model = tiny_model()
    with_experts = model.generate(PROMPTS, max_tokens=12, logprobs=3, return_routed_experts=True)
    without = model.generate(PROMPTS, max_tokens=12, logprobs=3)
    for a, b in zip(with_experts, without, strict=True):
        assert b.routed_experts is None and a.token_ids == b.token_ids
        assert [x.top for x in a.logprobs] == [x.top for x in b.logprobs]


def set_top_k(model, top_k: int) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k
    model.config.num_experts_per_tok = top_k


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_experts_per_token_equals_transformers_with_that_k(top_k, checkpoint, device):
    folder, theirs = checkpoint
    set_top_k(theirs, top_k)
    ours = mixtral.Mixtral.from_pretrained(folder, device=device, dtype="float32", experts_per_token=top_k)
    assert ours.config.top_k == top_k
    input_ids = torch.randint(3, TINY["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids).cpu(), theirs(input_ids).logits, atol=1e-4, rtol=0)
    per_request = mixtral.Mixtral.from_pretrained(folder, device=device, dtype="float32")
    prompt = input_ids[0, :20].tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    options = dict(max_tokens=16, ignore_eos=True, return_routed_experts=True)
    for result in (
        ours.generate([prompt], **options)[0],
        per_request.generate([prompt], experts_per_token=top_k, **options)[0],
    ):
        assert result.token_ids == expected[0, 20:].tolist()
        assert result.routed_experts.shape[2] == top_k


def test_requests_of_different_k_run_together_and_do_not_change_each_other():
    model = mixtral.Mixtral.from_config(tiny_config(), chunk_size=7)
    options = dict(max_tokens=40, ignore_eos=True, logprobs=2)

    def ask(k: int | None) -> list:
        return [
            (result.token_ids, [x.top for x in result.logprobs])
            for result in model.generate(PROMPTS, experts_per_token=k, **options)
        ]

    alone = {k: ask(k) for k in (None, 1, 3)}
    assert len({str(result) for result in alone.values()}) == 3
    assert ask(2) == alone[None]
    together: dict = {}
    threads = [threading.Thread(target=lambda k=k: together.update({k: ask(k)})) for k in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_stream_takes_another_number_of_experts():
    from python_models import demo_model

    model = demo_model()
    one = model.generate("Once upon a time", max_tokens=20, experts_per_token=1)[0].text
    assert "".join(model.stream("Once upon a time", max_tokens=20, experts_per_token=1)) == one
    assert one != model.generate("Once upon a time", max_tokens=20)[0].text


def test_wrong_arguments_are_value_errors(checkpoint):
    model = tiny_model()
    for wrong in (0, -1, 5):
        with pytest.raises(ValueError, match=f"experts_per_token must be .*, got {wrong}"):
            model.generate([[3]], experts_per_token=wrong)
        with pytest.raises(ValueError, match=f"experts_per_token must be .*, got {wrong}"):
            mixtral.Mixtral.from_pretrained(checkpoint[0], experts_per_token=wrong)
    dense = mixtral.Mixtral.from_config(tiny_config(num_experts=0, top_k=0))
    with pytest.raises(ValueError, match="left out, as the model has no experts, got 1"):
        dense.generate([[3]], experts_per_token=1)
    with pytest.raises(ValueError, match="the model has no experts"):
        dense.generate([[3]], return_routed_experts=True)
