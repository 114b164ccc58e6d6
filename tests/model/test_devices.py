"""The same weights give the same model on every device: logits close, greedy tokens equal."""

import os
import subprocess
import sys

import pytest
import torch

import mixtral
from python_models import DEMO, ROOT, tiny_config


@pytest.mark.parametrize("window", [0, 24])
def test_logits_and_greedy_tokens_equal_those_of_the_cpu(window, device):
    config = tiny_config(num_experts=8, num_layers=3, window=window)
    cpu, other = (mixtral.Mixtral.from_config(config, seed=1, device=d) for d in ("cpu", device))
    copies = other.named_parameters()
    for name, weight in cpu.named_parameters().items():
        if not name.endswith("norm"):
            weight.mul_(10)  # larger weights than at initialisation: logits that tell tokens apart
        copies[name].copy_(weight)
    input_ids = torch.randint(3, config.vocab_size, (3, 70))
    expected = cpu(input_ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(other(input_ids.to(device)).cpu(), expected, atol=1e-4, rtol=1e-4)
    prompts = [input_ids[0].tolist(), input_ids[1, :5].tolist()]
    tokens = [[r.token_ids for r in model.generate(prompts, max_tokens=40, ignore_eos=True)] for model in (cpu, other)]
    assert tokens[0] == tokens[1]


def test_loading_may_be_the_first_use_of_cuda():
    """In a process of its own: whatever used the device before would hide what loading needs."""
    code = f"import mixtral; print(mixtral.Mixtral.from_pretrained({str(DEMO)!r}, device='cuda').device)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if torch.cuda.is_available():
        assert result.stdout.startswith("cuda"), result.stderr
    else:
        expected = "RuntimeError: device cuda: this build or this machine has no CUDA device; use cpu"
        assert expected in result.stderr, result.stderr


def test_a_device_of_another_kind_is_named():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got mps"):
        mixtral.Mixtral.from_pretrained(DEMO, device="mps")


HEADS_OF_FAST_KERNELS = dict(hidden_size=256, intermediate_size=128, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize(
    ("sequences", "fields"),
    # A batch that is no power of two is padded; in bf16 the bits may depend on the batch (docs/numerics.md).
    [(5, {}), (4, HEADS_OF_FAST_KERNELS), (1, HEADS_OF_FAST_KERNELS)],
    ids=["float32", "bfloat16", "bfloat16 alone"],
)
def test_decoding_in_graphs_and_without_gives_the_same_tokens(sequences, fields, window, device, capfd):
    config = tiny_config(num_experts=8, num_layers=3, window=window, **fields)
    # Sequences of unequal length, which grow through several sizes of page table.
    prompts = [ids[: 5 + 6 * i] for i, ids in enumerate(torch.randint(3, config.vocab_size, (sequences, 30)).tolist())]
    results = []
    for cuda_graph in (True, False):
        model = mixtral.Mixtral.from_config(config, seed=1, device=device, cuda_graph=cuda_graph)
        results.append([r.token_ids for r in model.generate(prompts, max_tokens=40, ignore_eos=True)])
    assert results[0] == results[1]
    assert "without CUDA graphs" not in capfd.readouterr().err


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8, "min_p": 0.01}, {"repetition_penalty": 1.3}])
def test_tokens_do_not_depend_on_where_they_are_picked(options, device):
    """Asked for logprobs, the engine picks tokens on the host, else where the logits are."""
    config = tiny_config(num_experts=8, num_layers=2)
    model = mixtral.Mixtral.from_config(config, seed=1, device=device)
    prompts = torch.randint(3, config.vocab_size, (3, 20)).tolist()
    tokens = [
        [
            result.token_ids
            for result in model.generate(
                prompts, max_tokens=30, temperature=0.9, seed=5, ignore_eos=True, logprobs=logprobs, **options
            )
        ]
        for logprobs in (0, 1)
    ]
    assert tokens[0] == tokens[1]
