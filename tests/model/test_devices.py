"""The same weights give the same model on every device: logits close, greedy tokens equal."""

import pytest
import torch

import mixtral

CONFIG = dict(
    model_type="mixtral",
    vocab_size=128,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.mark.parametrize("window", [None, 24])
def test_logits_and_greedy_tokens_equal_those_of_the_cpu(window, device):
    config = {**CONFIG, "sliding_window": window}
    cpu, other = (mixtral.Mixtral.from_config(config, seed=1, device=d, dtype="float32") for d in ("cpu", device))
    input_ids = torch.randint(3, 128, (3, 70))
    torch.testing.assert_close(other(input_ids.to(device)).cpu(), cpu(input_ids), atol=1e-4, rtol=1e-4)
    prompts = [input_ids[0].tolist(), input_ids[1, :5].tolist()]
    arguments = dict(max_tokens=40, ignore_eos=True)
    tokens = [[result.token_ids for result in model.generate(prompts, **arguments)] for model in (cpu, other)]
    assert tokens[0] == tokens[1]
