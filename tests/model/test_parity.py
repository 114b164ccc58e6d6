"""Whole models against transformers: logits, greedy tokens, both checkpoint layouts, every window and routing."""

import pytest
import torch

import mixtral
from checkpoints import TINY, random_model, save_consolidated

LAYOUTS = ["hugging face v4 names", "hugging face v5 names", "consolidated"]
# Experts, top-k, window, key/value heads: each value of the matrix at least twice. 0 experts is the dense twin.
SHAPES = [
    (1, 1, None, 4),
    (2, 1, 5, 2),
    (3, 2, None, 1),
    (4, 4, 7, 2),
    (8, 2, None, 2),
    (8, 2, 6, 1),
    (16, 3, 9, 4),
    (16, 4, None, 2),
]


def save(model, folder, layout: str) -> None:
    if layout == "consolidated":
        save_consolidated(model, folder)
    else:
        model.save_pretrained(folder, save_original_format=layout == "hugging face v4 names")


def logits_of(model, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids).logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("experts", "top_k", "window", "kv_heads"), SHAPES)
def test_f32_logits_and_greedy_tokens_equal_transformers(experts, top_k, window, kv_heads, layout, tmp_path, device):
    theirs = random_model(
        num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=window, num_key_value_heads=kv_heads
    )
    save(theirs, tmp_path, layout)
    ours = mixtral.Mixtral.from_pretrained(tmp_path, device=device, dtype="float32")
    assert ours.config.window == (window or 0)

    input_ids = torch.randint(3, TINY["vocab_size"], (2, 40))
    torch.testing.assert_close(ours(input_ids).cpu(), logits_of(theirs, input_ids), atol=1e-4, rtol=0)

    prompts = [input_ids[0, :25].tolist(), input_ids[1, :3].tolist()]
    for prompt, result in zip(prompts, ours.generate(prompts, max_tokens=20, ignore_eos=True), strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert result.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("window", [None, 6])
def test_dense_twin_equals_transformers_mistral(window, tmp_path, device):
    theirs = random_model(dense=True, sliding_window=window)
    theirs.save_pretrained(tmp_path)
    ours = mixtral.Mixtral.from_pretrained(tmp_path, device=device, dtype="float32")
    input_ids = torch.randint(3, TINY["vocab_size"], (2, 30))
    torch.testing.assert_close(ours(input_ids).cpu(), logits_of(theirs, input_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 6])
def test_half_precision_error_is_within_twice_that_of_transformers(window, dtype, tmp_path, device):
    # Routing of near ties may flip between precisions, so all experts take part here.
    theirs = random_model(num_local_experts=4, num_experts_per_tok=4, sliding_window=window).to(dtype)
    theirs.save_pretrained(tmp_path)
    input_ids = torch.randint(3, TINY["vocab_size"], (4, 64))
    ours = mixtral.Mixtral.from_pretrained(tmp_path, device=device, dtype=dtype)(input_ids).cpu()
    baseline = logits_of(theirs, input_ids)
    oracle = logits_of(theirs.double(), input_ids)
    assert (ours - oracle).abs().max() <= 2 * (baseline - oracle).abs().max()
    assert (ours - oracle).square().mean() <= 4 * (baseline - oracle).square().mean()


def test_negative_control_a_window_off_by_one_is_seen(tmp_path):
    """The tolerance above is tight enough to tell W keys from W + 1."""
    theirs = random_model(sliding_window=6)
    input_ids = torch.randint(3, TINY["vocab_size"], (1, 30))
    expected = logits_of(theirs, input_ids)
    theirs.config.sliding_window = 7
    theirs.save_pretrained(tmp_path)
    ours = mixtral.Mixtral.from_pretrained(tmp_path, dtype="float32")(input_ids)
    assert (ours - expected).abs().max() > 1e-2
