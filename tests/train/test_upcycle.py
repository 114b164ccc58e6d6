"""`mixtral upcycle`: the same numbers as the dense model, a receipt of every tensor, and clear errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixtral
from binary import DEMO, ROOT, edit_config, environment
from checkpoints import interleaved, random_model
from mixtral.train import Batch, Mixtral
from mixtral.train import upcycle as command
from mixtral.train.upcycle import UpcycleSettings, upcycle

IDS = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in float32, in one file, with a tokenizer beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    random_model(dense=True, sliding_window=16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    (folder / "README.md").write_text("of the dense model\n")
    return folder


def consolidated(dense: Path, folder: Path, pth: bool) -> Path:
    """``dense`` in Mistral's layout."""
    config, weights = json.loads((dense / "config.json").read_text()), load_file(dense / "model.safetensors")
    params = dict(dim=64, n_layers=2, head_dim=16, hidden_dim=48, n_heads=4, n_kv_heads=2, norm_eps=1e-5)
    params |= dict(vocab_size=96, sliding_window=16, rope_theta=config["rope_parameters"]["rope_theta"])
    renamed = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, 4 if "q_proj" in name else 2)
        for theirs, ours in {
            "model.": "", "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", 
            "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        }.items():  # fmt: skip
            name = name.replace(theirs, ours)
        renamed[name] = weight
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    if pth:
        torch.save(renamed, folder / "consolidated.00.pth")
    else:
        save_file(renamed, folder / "consolidated.safetensors")
    return folder


def logits(folder: Path) -> torch.Tensor:
    return mixtral.Mixtral.from_pretrained(folder, dtype="float32")(IDS)


def difference(folder: Path, dense: Path) -> float:
    """Of the logits, relative to the largest one."""
    expected = logits(dense)
    return ((logits(folder) - expected).abs().max() / expected.abs().max()).item()


def tensors_of(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """name -> (file, shape, dtype), by the library of safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = (path, part.get_shape(), part.get_dtype())
    return found


@pytest.mark.parametrize("experts, top_k", [(8, 2), (4, 4), (3, 2)])
def test_the_new_model_computes_what_the_dense_one_does(dense: Path, tmp_path: Path, experts: int, top_k: int) -> None:
    """In C++ and in the module for training."""
    receipt = upcycle(dense, tmp_path / "out", UpcycleSettings(experts=experts, top_k=top_k))
    assert receipt["identity"]
    assert difference(tmp_path / "out", dense) <= 1e-5
    with torch.no_grad():
        module, expected = (Mixtral.from_pretrained(folder).eval()(IDS) for folder in (tmp_path / "out", dense))
    assert (module - expected).abs().max() <= 1e-5 * expected.abs().max()
    balance = Mixtral.from_pretrained(tmp_path / "out").loss(Batch.from_padded(IDS)).load
    assert (balance > 0).sum() > balance.shape[0], "several experts are used"


def test_transformers_reads_the_new_model(dense: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    upcycle(dense, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model(IDS).logits
    assert (theirs - logits(dense)).abs().max() / theirs.abs().max() <= 1e-5


@pytest.mark.parametrize("pth", [False, True], ids=["safetensors", "pth"])
def test_reads_the_layout_of_mistral(dense: Path, tmp_path: Path, pth: bool) -> None:
    source = consolidated(dense, tmp_path / "source", pth)
    upcycle(source, tmp_path / "out", UpcycleSettings(dtype="float32"))
    assert difference(tmp_path / "out", dense) <= 1e-5


def test_a_sharded_model_gives_a_sharded_one(dense: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    upcycle(tmp_path / "source", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = tensors_of(tmp_path / "out")
    assert index["weight_map"] == {name: path.name for name, (path, _, _) in found.items()}
    assert difference(tmp_path / "out", dense) <= 1e-5


def test_the_receipt_has_every_tensor_and_where_it_comes_from(dense: Path, tmp_path: Path) -> None:
    import hashlib

    upcycle(dense, tmp_path / "out", UpcycleSettings(dtype="bfloat16"))
    receipt = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    found = tensors_of(tmp_path / "out")
    assert set(receipt["tensors"]) == set(found)
    sources = load_file(dense / "model.safetensors")
    used = set()
    for name, entry in receipt["tensors"].items():
        path, shape, dtype = found[name]
        assert (entry["file"], entry["shape"], entry["dtype"]) == (path.name, shape, "bfloat16")
        assert dtype == "BF16"
        for source in entry["sources"]:
            assert source["file"] == "model.safetensors"
            assert source["sha256"] == hashlib.sha256(sources[source["tensor"]].numpy().tobytes()).hexdigest()
            used.add(source["tensor"])
        assert bool(entry["sources"]) != name.endswith("mlp.gate.weight"), "the router alone is new"
    assert used == set(sources), "every dense tensor is used"
    assert receipt["files"] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in receipt["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()


def test_the_router_is_a_cut_normal_distribution_of_its_seed(dense: Path, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(dense, tmp_path / out, UpcycleSettings(experts=64, router_std=0.1, seed=seed))
    a, b, c = (load_file(tmp_path / out / "model.safetensors") for out in "abc")
    routers = [name for name in a if name.endswith("mlp.gate.weight")]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], c[name]) for name in routers)
    assert not torch.equal(a[routers[0]], a[routers[1]])
    for name in routers:  # 4096 values each; the standard deviation of a normal cut at two sigma is 0.8796 sigma
        assert a[name].abs().max() <= 0.2
        assert a[name].std().item() == pytest.approx(0.08796, rel=0.05)


def test_scale_nvidia_is_the_cube_root_and_the_softmax_comes_first(dense: Path, tmp_path: Path) -> None:
    receipt = upcycle(dense, tmp_path / "out", UpcycleSettings(experts=8, top_k=1, scale="nvidia"))
    assert not receipt["identity"]
    new, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(dense / "model.safetensors")
    mlp = "model.layers.1.mlp."
    for expert in (0, 7):  # (8 / 1)^(1/3) = 2
        gate, up = new[mlp + "experts.gate_up_proj"][expert].chunk(2)
        assert torch.equal(gate, 2 * old[mlp + "gate_proj.weight"])
        assert torch.equal(up, 2 * old[mlp + "up_proj.weight"])
        assert torch.equal(new[mlp + "experts.down_proj"][expert], 2 * old[mlp + "down_proj.weight"])
    assert not mixtral.Config.from_folder(tmp_path / "out").renormalize
    assert UpcycleSettings(experts=8, top_k=2, scale="nvidia").factor == pytest.approx(4 ** (1 / 3))


def test_noise_changes_its_share_of_the_weights_of_each_expert(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "out", UpcycleSettings(experts=4, noise=0.5, noise_share=0.25))
    new, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(dense / "model.safetensors")
    down, dense_down = new["model.layers.0.mlp.experts.down_proj"], old["model.layers.0.mlp.down_proj.weight"]
    change = down - dense_down
    assert (change != 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert change[change != 0].std().item() == pytest.approx(0.5 * dense_down.std().item(), rel=0.1)
    assert not torch.equal(change[0], change[1])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top-k", "9"], "top_k must be in [1, 8], the number of experts, got 9"),
        (["--top-k", "1"], "top_k 1: the one weight of a token is always 1"),
        (["--experts", "1"], "experts must be in [2, 65536], got 1"),
        (["--router-std", "0"], "router_std must be in (0, 10), got 0.0"),
        (["--noise", "-1"], "noise must be in [0, 10), got -1.0"),
        (["--dtype", "int8"], "dtype must be auto, float32, bfloat16 or float16, got int8"),
        (["--scale", "google"], "invalid choice: 'google'"),
        (["--expert", "4"], "unrecognized arguments: --expert 4"),
    ],
)
def test_a_wrong_flag_is_one_line(dense: Path, tmp_path: Path, flags: list[str], message: str, capsys) -> None:
    assert command.main([str(dense), str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_fit_is_one_line(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def run(source: Path, out: Path) -> tuple[int, str]:
        status = command.main([str(source), str(out)])
        return status, capsys.readouterr().err

    out = tmp_path / "out"
    status, error = run(DEMO, out)
    assert status == 2 and "has 8 experts a layer already" in error
    status, error = run(tmp_path / "none", out)
    assert status == 3 and "does not exist" in error
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    status, error = run(dense, used)
    assert status == 2 and "must not exist or be an empty folder" in error

    spoilt = Path(shutil.copytree(dense, tmp_path / "spoilt"))
    weights = load_file(spoilt / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    status, error = run(spoilt, out)
    assert status == 3 and "model.layers.1.mlp.up_proj.weight" in error and "missing" in error
    (spoilt / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-100])
    assert run(spoilt, out)[0] == 3
    shutil.copyfile(dense / "model.safetensors", spoilt / "model.safetensors")
    edit_config(spoilt, intermediate_size=52)
    status, error = run(spoilt, out)
    assert status == 3 and "shape" in error

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    status, error = run(dense, out)
    assert status == 5 and "GB left" in error
    assert not out.exists() and not out.with_name("out.incomplete").exists()


def test_an_interrupted_run_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / "out.incomplete" / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(command.tqdm, "update", interrupt)
    assert command.main([str(dense), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("mixtral: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_python_runs_the_command(dense: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mixtral", "upcycle", dense, tmp_path / "out", "--experts", "4"],
        env=environment(PYTHONPATH=str(ROOT / "python")),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert run.stdout.startswith(f"{tmp_path / 'out'}: 21 tensors, 4 experts, top-2\n")
