"""lm-evaluation-harness over HTTP scores as it does in this process."""

import os
import random

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import check_remote_tokenizer_support

import mixtral
from mixtral.integrations.lm_eval import MixtralLM

pytest_plugins = ["server_fixtures"]

WORDS = "and the king said unto them that he would give a tenth of all his land to his son, élan 𓀀".split(" ")


def texts(count: int, longest: int, numbers: random.Random) -> list[str]:
    return [" ".join(numbers.choices(WORDS, k=numbers.randint(1, longest))) for _ in range(count)]


@pytest.fixture
def client(server_url: str) -> LocalCompletionsAPI:
    url = f"{server_url}/v1/completions"
    assert check_remote_tokenizer_support(url)
    return LocalCompletionsAPI(url, "remote", model="mixtral", batch_size=8, max_length=1024, max_retries=1)


def test_loglikelihoods(client: LocalCompletionsAPI, server_model: mixtral.Mixtral) -> None:
    """A thousand, in batches of 8 with different lengths; greedy continuations among them, and an empty context."""
    numbers = random.Random(0)
    contexts = texts(999, 30, numbers)
    greedy = server_model.generate(
        [server_model.tokenizer.encode(context, add_bos=False) for context in contexts[:300]],
        max_tokens=2,
        temperature=0,
    )
    continuations = [out.text for out in greedy] + [" " + text for text in texts(699, 6, numbers)]
    pairs = [(context, text) for context, text in zip(contexts, continuations, strict=True) if text]
    pairs.append(("", "and the king"))
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = MixtralLM(server_model, add_bos_token=False).loglikelihood(requests, disable_tqdm=True)
    actual = client.loglikelihood(requests, disable_tqdm=True)
    assert [pair[0] for pair in actual] == pytest.approx([pair[0] for pair in expected], abs=1e-5)
    assert [pair[1] for pair in actual] == [pair[1] for pair in expected]
    assert len(pairs) > 950 and sum(pair[1] for pair in actual) > 50


def test_generations(client: LocalCompletionsAPI, server_model: mixtral.Mixtral) -> None:
    arguments = {"until": ["xyz"], "max_gen_toks": 8, "do_sample": False}
    contexts = texts(10, 20, random.Random(1))
    requests = [Instance("generate_until", {}, (context, arguments), i) for i, context in enumerate(contexts)]
    expected = server_model.generate(
        [server_model.tokenizer.encode(context, add_bos=False) for context in contexts], max_tokens=8, temperature=0
    )
    assert client.generate_until(requests, disable_tqdm=True) == [generation.text for generation in expected]
