"""Penalties, bias, stops, samples, log-probabilities of prompts, and constrained requests from Python."""

import queue

import pytest
import torch
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

import mixtral
from python_models import demo_model, tiny_model

PROMPT = [5, 6, 7, 6]


@pytest.fixture(scope="module")
def tiny() -> mixtral.Mixtral:
    return tiny_model()


@pytest.fixture(scope="module")
def demo() -> mixtral.Mixtral:
    return demo_model()


def greedy(model: mixtral.Mixtral, tokens: int, processors: LogitsProcessorList, presence=0.0, frequency=0.0):
    """What transformers' processors, and OpenAI's formula, make of the model's logits step by step."""
    ids = list(PROMPT)
    for _ in range(tokens):
        scores = processors(torch.tensor([ids]), model(torch.tensor([ids]))[:, -1].clone())[0]
        generated = torch.bincount(torch.tensor(ids[len(PROMPT) :], dtype=torch.int64), minlength=len(scores))
        ids.append(int((scores - presence * (generated > 0) - frequency * generated).argmax()))
    return ids[len(PROMPT) :]


def test_penalties_and_bias_are_those_of_transformers_and_openai(tiny):
    plain = tiny.generate(PROMPT, max_tokens=24, ignore_eos=True)[0].token_ids
    bias = {plain[0]: -0.05, 11: 0.03, 40: 0.02}
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.2), SequenceBiasLogitsProcessor({(i,): b for i, b in bias.items()})]
    )
    options = dict(repetition_penalty=1.2, logit_bias=bias, presence_penalty=0.04, frequency_penalty=0.03)
    out = tiny.generate(PROMPT, max_tokens=24, ignore_eos=True, **options)[0].token_ids
    assert out == greedy(tiny, 24, processors, presence=0.04, frequency=0.03)
    for name in options:  # each of them matters
        assert out != tiny.generate(PROMPT, max_tokens=24, ignore_eos=True, **{**options, name: None})[0].token_ids, (
            name
        )


def test_min_tokens_keeps_the_ends_away(tiny):
    plain = tiny.generate(PROMPT, max_tokens=16, ignore_eos=True)[0].token_ids
    stop = plain[2]
    out = tiny.generate(PROMPT, max_tokens=16, ignore_eos=True, stop_token_ids=[stop])[0]
    assert out.finish_reason == "stop" and out.token_ids == plain[: plain.index(stop)]
    processors = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, stop)])
    later = tiny.generate(PROMPT, max_tokens=16, ignore_eos=True, stop_token_ids=[stop], min_tokens=9)[0]
    expected = greedy(tiny, 16, processors)
    assert len(later.token_ids) >= 9 and stop not in later.token_ids
    assert later.token_ids == expected[: len(later.token_ids)]


def test_an_answer_goes_on_from_its_first_tokens(tiny):
    options = dict(temperature=1.0, seed=3, ignore_eos=True)
    whole = tiny.generate(PROMPT, max_tokens=20, **options)[0].token_ids
    assert tiny.generate(PROMPT + whole[:8], max_tokens=12, **options)[0].token_ids == whole[8:]


def test_n_samples_of_each_prompt_have_their_own_random_numbers(tiny):
    options = dict(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    shown = set()
    prompts = [PROMPT, [8]]
    results = tiny.generate(prompts, n=3, on_text=lambda index, text: shown.add(index), **options)
    assert shown == set(range(6))
    assert [result.prompt_token_ids for result in results] == [PROMPT] * 3 + [[8]] * 3
    assert len({tuple(result.token_ids) for result in results}) == 6
    for index, result in enumerate(results):
        seed = mixtral._C.sample_seed(3, index % 3)
        alone = tiny.generate(prompts[index // 3], **{**options, "seed": seed})[0]
        assert alone.token_ids == result.token_ids
    unseeded = tiny.generate(PROMPT, n=2, **{**options, "seed": None})
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_prompt_logprobs_are_those_of_the_forward_pass(tiny):
    out = tiny.generate(PROMPT, max_tokens=2, prompt_logprobs=3)[0]
    expected = tiny(torch.tensor([PROMPT]))[0].double().log_softmax(-1)
    assert len(out.prompt_logprobs) == len(PROMPT) and out.prompt_logprobs[0] is None
    for place, entry in enumerate(out.prompt_logprobs[1:]):
        assert entry.token_id == PROMPT[place + 1] and len(entry.top) == 3
        assert entry.logprob == pytest.approx(expected[place, entry.token_id].item(), abs=1e-5)
        assert entry.top[0][0] == int(expected[place].argmax())
    assert tiny.generate(PROMPT, max_tokens=2)[0].prompt_logprobs == []


def test_stream_takes_the_same_options(demo):
    options = dict(max_tokens=16, presence_penalty=1.5, min_tokens=4, stop_token_ids={2}, logit_bias={300: 2.0})
    assert "".join(demo.stream("The", **options)) == demo.generate("The", **options)[0].text


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(presence_penalty=2.1), r"presence_penalty must be in \[-2, 2\], got 2.1"),
        (dict(frequency_penalty=-3), r"frequency_penalty must be in \[-2, 2\], got -3"),
        (dict(logit_bias={3: 101}), r"logit_bias must be in \[-100, 100\], got 101"),
        (dict(logit_bias={96: 1}), r"logit_bias must be of token ids in \[0, 96\), got 96"),
        (dict(stop_token_ids=[96]), r"stop_token_ids must be of token ids in \[0, 96\), got 96"),
        (dict(min_tokens=-1), "min_tokens must be >= 0, got -1"),
        (dict(prompt_logprobs=21), r"prompt_logprobs must be in \[0, 20\], got 21"),
        (dict(n=0), "n must be >= 1, got 0"),
    ],
)
def test_wrong_values_are_value_errors_that_name_them(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate([1], **options)


# ---- constrained requests --------------------------------------------------------------------------------------------


def mask_of(ids: list[int], vocab: int) -> bytes:
    """Of int32 [ceil(vocab / 32)], bit i % 32 of word i / 32 of each id set."""
    return sum(1 << token_id for token_id in set(ids)).to_bytes(-(-vocab // 32) * 4, "little")


def test_a_constrained_request_takes_only_what_its_masks_allow(demo):
    """The masks come from this thread, one after each token, while another prompt runs beside it."""
    vocab = demo.config.vocab_size
    digits = [demo.tokenizer.encode(str(digit))[-1] for digit in range(10)]
    events: queue.SimpleQueue = queue.SimpleQueue()
    params = mixtral._C.SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)
    prompt = demo.tokenizer.encode("In the year", add_bos=True)
    request = demo._engine.submit(prompt, params, 0, events.put, events.put, constrained=True)
    demo._engine.allow([request], [mask_of(digits, vocab)])
    beside = demo.generate("The", max_tokens=8, ignore_eos=True)[0]
    while isinstance(event := events.get(timeout=60), str):
        demo._engine.allow([request], [mask_of(digits, vocab)])
    out = event.result()
    assert len(out.token_ids) == 12 and set(out.token_ids) <= set(digits) and len(set(out.token_ids)) > 1
    assert beside.token_ids == demo.generate("The", max_tokens=8, ignore_eos=True)[0].token_ids
    with pytest.raises(ValueError, match=r"mask must have \d+ words of 32 tokens, got 1"):
        demo._engine.allow([request], [bytes(4)])
    with pytest.raises(ValueError, match="a mask must be of whole words of 32 tokens"):
        demo._engine.allow([request], [bytes(5)])
    with pytest.raises(ValueError, match="masks must be as many as ids"):
        demo._engine.allow([request], [mask_of([], vocab)] * 2)
