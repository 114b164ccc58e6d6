"""mixtral.integrations.transformers: the numbers of transformers' own eager implementation, or an error in words."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, StaticCache

import mixtral
from checkpoints import random_model
from mixtral import ops
from mixtral.integrations import transformers as integration

WINDOWS = [None, 1, 5, 8]
LENGTH = 37  # several windows, no multiple of one

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def registered():
    mixtral.integrations.transformers.register()


def pair(**overrides) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(eager, ours): one set of weights, two implementations."""
    torch.manual_seed(0)
    eager = random_model(**overrides)
    eager.set_experts_implementation("eager")
    ours = random_model(**overrides)
    ours.load_state_dict(eager.state_dict())
    ours.set_experts_implementation("mixtral")
    ours.set_attn_implementation("mixtral")
    return eager, ours


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits(window, batch):
    eager, ours = pair(sliding_window=window)
    ids = torch.randint(96, (batch, LENGTH))
    assert_close(ours(ids).logits, eager(ids).logits)


@pytest.mark.parametrize("implementation", ["experts_implementation", "attn_implementation"])
def test_each_implementation_works_without_the_other(implementation, monkeypatch):
    eager, _ = pair(sliding_window=8)
    called = []
    for name in ("moe_mlp", "sliding_window_attention"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name, **kw: called.append(name) or op(*args, **kw))
    other = {"attn_implementation": "experts_implementation", "experts_implementation": "attn_implementation"}
    ours = random_model(sliding_window=8)
    ours.load_state_dict(eager.state_dict())
    for name, value in ((implementation, "mixtral"), (other[implementation], "eager")):
        getattr(ours, f"set_{name}")(value)
    ids = torch.randint(96, (2, LENGTH))
    assert_close(ours(ids).logits, eager(ids).logits)
    assert set(called) == {"moe_mlp" if implementation == "experts_implementation" else "sliding_window_attention"}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(window, side):
    eager, ours = pair(sliding_window=window)
    ids = torch.randint(96, (3, LENGTH))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 20)):
        mask[row, slice(padding) if side == "left" else slice(LENGTH - padding, None)] = 0
    tokens = mask.bool()
    actual = ours(ids, attention_mask=mask).logits
    assert_close(actual[tokens], eager(ids, attention_mask=mask).logits[tokens])
    assert actual.isfinite().all()


@pytest.mark.parametrize("window", WINDOWS)
def test_packed_sequences(window):
    """Positions that begin again at 0 begin a new sequence, which sees nothing of the one before."""
    eager, ours = pair(sliding_window=window)
    ids = torch.randint(96, (2, LENGTH))
    lengths = ((12, 3, LENGTH - 15), (LENGTH - 1, 1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    options = dict(position_ids=positions, use_cache=False)  # with a cache, transformers does not look for packing
    assert_close(ours(ids, **options).logits, eager(ids, **options).logits)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_attention_trains(form, window):
    """Every parameter of a model gets the gradient that eager attention gives it."""
    eager, ours = pair(sliding_window=window)
    ours.set_experts_implementation("eager")
    ids, tokens, options = torch.randint(96, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.bool), {}
    if form == "padded":
        tokens[1, :9] = False
        options = {"attention_mask": tokens.long()}
    else:
        positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])
        options = {"position_ids": positions.expand(2, -1)}
    slope = torch.randn(2, LENGTH, 96)[tokens]
    with torch.enable_grad():
        for model in (eager, ours):
            (model(ids, use_cache=False, **options).logits[tokens] * slope).sum().backward()
    for (name, expected), actual in zip(eager.named_parameters(), ours.parameters(), strict=True):
        error = (actual.grad - expected.grad).abs().max()
        assert error <= 1e-4 * expected.grad.abs().max(), f"{name}: {error}"


@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_through_the_cache(window):
    eager, ours = pair(sliding_window=window)
    ids = torch.randint(96, (2, LENGTH))
    cache, logits = None, []
    for chunk in ids.split([11, 1, 1, 14, 10], dim=1):  # longer than a window behind a full cache, too
        out = ours(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert_close(torch.cat(logits, 1), eager(ids).logits)


# Not window 1: there the cache of transformers 5.17 keeps every key, and its own eager attention sees them all.
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("padding", [0, 7])
def test_greedy_generate(window, padding):
    eager, ours = pair(sliding_window=window)
    ids = torch.randint(3, 96, (2, 15))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("dense", [False, True])
def test_from_pretrained(tmp_path, dense):
    torch.manual_seed(0)
    model = random_model(dense=dense, sliding_window=8)
    model.save_pretrained(tmp_path)
    experts = {} if dense else {"experts_implementation": "mixtral"}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="mixtral", **experts)
    ids = torch.randint(96, (2, LENGTH))
    assert_close(ours(ids).logits, model(ids).logits)


def test_bfloat16_is_as_close_to_f32_as_eager():
    eager, ours = pair(sliding_window=8)
    ids = torch.randint(96, (2, LENGTH))
    exact = eager(ids).logits
    error = (ours.bfloat16()(ids).logits.float() - exact).abs().mean()
    assert error <= 2 * (eager.bfloat16()(ids).logits.float() - exact).abs().mean()


def test_padding_with_a_hole_is_refused():
    _, ours = pair()
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask expected one run of ones in each row, got 2 runs"):
        ours(torch.randint(96, (2, 4)), attention_mask=mask)


def test_masks_of_four_dimensions_are_refused():
    _, ours = pair()
    with pytest.raises(ValueError, match=r"attention_mask expected 2 dimensions .* \(1, 1, 4, 4\)"):
        ours(torch.randint(96, (1, 4)), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_static_cache_is_refused():
    _, ours = pair()
    cache = StaticCache(config=ours.config, max_cache_len=32)
    with pytest.raises(ValueError, match="expected a DynamicCache"):
        ours(torch.randint(96, (1, 4)), past_key_values=cache)


def test_dropout_is_refused():
    _, ours = pair(attention_dropout=0.1)
    with pytest.raises(ValueError, match="dropout expected 0, got 0.1"):
        ours.train()(torch.randint(96, (1, 4)))


@pytest.mark.parametrize(
    "changes, word",
    [({"is_causal": False}, "is_causal"), ({"softcap": 30.0}, "softcap"), ({"s_aux": torch.ones(4)}, "s_aux")],
)
def test_attention_refuses_what_it_does_not_have(changes, word):
    module = torch.nn.Module()
    module.is_causal = True
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match=word):
        integration.attention_forward(module, q, q, q, None, **changes)


def test_other_experts_are_refused():
    config = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**config, num_key_value_heads=1, hidden_act="gelu"), experts_implementation="mixtral"
    )
    with pytest.raises(ValueError, match="SwiGLU experts"):
        model(torch.zeros(1, 3, dtype=torch.int64))
