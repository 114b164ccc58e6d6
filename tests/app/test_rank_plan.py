"""`mixtral info --plan`: what each process of a model that is split would hold."""

import json
from pathlib import Path

import pytest

from binary import mixtral, ok, ok_json
from test_binary import MIXTRAL_8X7B

EMBEDDINGS = 2 * 32000 * 4096  # bytes in bf16; the lm_head has as many
QKV, OUT = 2 * (32 + 2 * 8) * 128 * 4096, 2 * 4096 * 4096
EXPERT = 2 * 3 * 14336 * 4096
OTHERS = 2 * 2 * 4096 + 4 * 8 * 4096  # of a layer: two norms, and the router in float32


@pytest.fixture
def big_model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return tmp_path


def plan(model: Path, *arguments: str) -> dict:
    return ok_json("info", model, "--plan", *arguments)["plan"]


def test_one_process_holds_what_info_says(big_model):
    info = ok_json("info", big_model, "--plan")
    (rank,) = info["plan"]["ranks"]
    memory = info["memory"]
    for name in ["weights_bytes", "kv_bytes_per_token", "kv_bytes", "activations_bytes", "total_bytes"]:
        assert rank[name] == memory[name]
    assert "plan" not in ok_json("info", big_model)


def test_two_processes_have_half_of_the_matrices_each(big_model):
    for flags in [["--tensor-parallel-size", "2"], ["--tp", "2", "--pp", "1", "--no-expert-parallel"]]:
        result = plan(big_model, *flags)
        whole_experts = "--no-expert-parallel" not in flags
        assert (result["tensor_parallel_size"], result["pipeline_parallel_size"]) == (2, 1)
        assert result["expert_parallel"] == whole_experts
        assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
        for rank in result["ranks"]:
            assert rank["num_heads"] == 16 and rank["num_kv_heads"] == 4
            assert rank["num_experts"] == (4 if whole_experts else 8)
            assert rank["embeddings_bytes"] == EMBEDDINGS and rank["lm_head_bytes"] == EMBEDDINGS // 2
            assert rank["attention_bytes"] == 32 * (QKV + OUT) // 2
            assert rank["mlp_bytes"] == 32 * 4 * EXPERT
            assert rank["other_bytes"] == 32 * OTHERS + 2 * 4096
            kinds = ["embeddings", "attention", "mlp", "lm_head", "other"]
            assert rank["weights_bytes"] == sum(rank[f"{kind}_bytes"] for kind in kinds)
            assert rank["kv_bytes_per_token"] == 2 * 2 * 32 * 4 * 128


def test_stages_have_the_layers_in_turn_and_the_last_one_comes_first(big_model):
    last, first = plan(big_model, "--pipeline-parallel-size", "2")["ranks"]
    assert (last["rank"], last["stage"], last["first_layer"], last["end_layer"]) == (0, 1, 16, 32)
    assert (first["rank"], first["stage"], first["first_layer"], first["end_layer"]) == (1, 0, 0, 16)
    assert (last["embeddings_bytes"], last["lm_head_bytes"]) == (0, EMBEDDINGS)
    assert (first["embeddings_bytes"], first["lm_head_bytes"]) == (EMBEDDINGS, 0)
    assert last["mlp_bytes"] == first["mlp_bytes"] == 16 * 8 * EXPERT


def test_types_and_devices_count_as_for_one_process(big_model):
    (one,) = plan(big_model, "--dtype", "int4")["ranks"]
    ranks = plan(big_model, "--dtype", "int4", "--tp", "4", "--pp", "2", "-c", "1000")["ranks"]
    assert len(ranks) == 8
    assert sum(rank["mlp_bytes"] for rank in ranks) == pytest.approx(one["mlp_bytes"], rel=1e-6)
    assert all(rank["kv_bytes"] < one["kv_bytes"] / 32 for rank in ranks)


def test_lines_name_every_rank(big_model):
    text = ok("info", big_model, "--tensor-parallel-size", "2").decode()
    assert text.startswith("architecture")
    assert "rank 0" in text and "rank 1" in text and "4 experts" in text
    assert "16 query and 4 key/value heads" in text and "64.00 KiB per token" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], b"tensor_parallel_size must divide num_heads 32, got 3"),
        (["--tp", "16"], b"tensor_parallel_size must divide num_experts 8, got 16"),
        (["--pp", "33"], b"pipeline_parallel_size must be at most num_layers 32, got 33"),
    ],
)
def test_what_cannot_be_split_is_a_model_that_does_not_fit(big_model, arguments, message):
    run = mixtral("info", big_model, *arguments)
    assert run.returncode == 3
    assert message in run.stderr and run.stderr.count(b"\n") == 1


def test_the_demo_model_over_four_ranks_names_both_numbers():
    run = mixtral("info", "--plan", "--tensor-parallel-size", "4")
    assert run.returncode == 3 and b"tensor_parallel_size must divide num_heads 6, got 4" in run.stderr
    run = mixtral("info", "--plan", "--tensor-parallel-size", "0")
    assert run.returncode == 2 and b"must be in [1, 4096], got 0" in run.stderr
