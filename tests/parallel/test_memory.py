"""What ranks need of the memory of their host."""

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from binary import DEMO, mixtral
from random_models import Shape, write_checkpoint
from rank_processes import LAYOUTS, Ranks


def limited(limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def own_data_bytes() -> int:
    """What ranks and their libraries have as data beside weights, which is much where they have CUDA kernels."""
    with Ranks(DEMO, LAYOUTS["tp2"]) as ranks:
        states = [Path(f"/proc/{pid}/status").read_text() for pid in ranks.until_idle(0)]
    return max(int(state.partition("VmData:")[2].split()[0]) for state in states) * 1024


LARGE = Shape(hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=1792, vocab=4096)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model whose weights are nearly all in the layers, so that two ranks have half of them each."""
    folder = write_checkpoint(LARGE, tmp_path_factory.mktemp("large") / "model")
    shutil.copy(DEMO / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_two_ranks_run_a_model_whose_weights_are_twice_what_each_may_have(layout, large):
    """Beside the program itself, half of the weights, and what the plan of the ranks says of all else."""
    sizes = ["--ctx-size", "64", "--json"]
    arguments = ["generate", large, "-p", "In the beginning", "-n", "8", "--ignore-eos", "-t", "1", *sizes]
    plan = json.loads(mixtral("info", large, "--plan", *LAYOUTS[layout], *sizes).stdout)["plan"]["ranks"][0]
    others = plan["activations_bytes"] + plan["kv_bytes"]
    limit = own_data_bytes() + int(LARGE.weight_bytes("bfloat16") / 2) + others
    alone = mixtral(*arguments, preexec_fn=limited(limit))
    assert alone.returncode == 4, alone.stderr
    cut = mixtral(*arguments, *LAYOUTS[layout], preexec_fn=limited(limit))
    assert cut.returncode == 0, cut.stderr
    assert json.loads(cut.stdout)["token_ids"] == json.loads(mixtral(*arguments).stdout)["token_ids"]


def write_empty_model(folder: Path, weight_bytes: int) -> None:
    """A dense model of at least so many bytes, whose weights are a hole in a file: it takes no room on the disk."""
    hidden, heads, head_dim, vocab, intermediate = 4096, 32, 128, 4096, 1 << 16
    layers = weight_bytes // (2 * hidden * (4 * heads * head_dim + 3 * intermediate)) + 1
    shapes = {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocab, hidden],
    }
    for layer in (f"model.layers.{i}" for i in range(layers)):
        shapes |= {
            f"{layer}.input_layernorm.weight": [hidden],
            f"{layer}.post_attention_layernorm.weight": [hidden],
            **{f"{layer}.self_attn.{name}_proj.weight": [heads * head_dim, hidden] for name in "qkvo"},
            f"{layer}.mlp.gate_proj.weight": [intermediate, hidden],
            f"{layer}.mlp.up_proj.weight": [intermediate, hidden],
            f"{layer}.mlp.down_proj.weight": [hidden, intermediate],
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    config = {
        "model_type": "mistral",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(DEMO / "tokenizer.model", folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_ranks_of_one_host_that_do_not_fit_it_together(tmp_path):
    """Each of them alone would."""
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    write_empty_model(tmp_path / "model", int(1.2 * available))
    run = mixtral("generate", tmp_path / "model", "-p", "a", "--tp", "2", preexec_fn=limited(4 << 30))
    assert run.returncode == 4 and run.stderr.count(b"\n") == 1, run.stderr
    assert b"for ranks 0, 1, which share a host: needs " in run.stderr
    needed, free = (float(word) for word in run.stderr.split() if word.replace(b".", b"").isdigit())
    assert needed > 1.2 * available / 2**30 and free < 1.2 * available / 2**30
