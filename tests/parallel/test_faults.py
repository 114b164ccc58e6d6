"""Ranks that die, stop, fail or disagree: everything ends soon, with one message and an exit status, and nobody stays.

MIXTRAL_RANK_FAULTS sets how often each rank is killed and stopped; the suite does it once.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from binary import DEMO, edit_config, mixtral
from rank_processes import ALL_GONE, LAYOUTS, Ranks, is_gone, listening_addresses, run_ranks, start_ranks, wait_until

pytest_plugins = ["parallel_fixtures"]

TIMES = int(os.environ.get("MIXTRAL_RANK_FAULTS", "1"))
STAGES = ("init", "load", "prefill", "decode", "idle")
SIZES = {"tp2": 2, "pp2": 2, "tp2pp2": 4}
EVERY_RANK = [(layout, rank) for layout, size in SIZES.items() for rank in range(size)]
GENERATE = ["-p", "In the beginning", "-n", "4", "--ignore-eos"]


def shared_memory() -> set[str]:
    """What has a name there, but for what Python and browsers of other tests may have just then."""
    return {
        name for name in os.listdir("/dev/shm") if not name.startswith((".org.chromium", "psm_", "sem.mp-", "torch_"))
    }


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    before = shared_memory()
    yield
    assert shared_memory() <= before


@pytest.fixture(scope="module", autouse=True)
def lonely_rank(splittable) -> Iterator[subprocess.Popen]:
    """Rank 0 alone of two. It waits for a minute, while the other tests run."""
    flags = ["--tp", "2", "--rank-timeout", "2", *GENERATE]
    (process,) = start_ranks(["generate", splittable, *flags], size=2)
    yield process
    process.kill()
    process.communicate()


def at_stage(ranks: Ranks, stage: str, rank: int) -> list[int]:
    """Brings the ranks there. Returns their process ids."""
    return getattr(ranks, f"until_{stage}")(rank)


def started(model: Path, layout: str, stage: str, *flags: str) -> Ranks:
    return Ranks(model, [*LAYOUTS[layout], *flags], max_tokens=3000 if stage == "decode" else 2)


def assert_all_end(ranks: Ranks, pids: list[int], lost: int, seconds: float = ALL_GONE) -> str:
    """Rank 0 exits with 5 and names the lost rank; nobody stays. Returns what it says."""
    status, errors = ranks.end()
    assert status == 5, errors
    assert errors.startswith(f"mixtral: rank {lost} ") and errors.count("\n") == 1, errors
    wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", seconds)
    return errors


# ---- a rank is killed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("layout", "rank"), EVERY_RANK)
def test_a_killed_rank_ends_all(layout, rank, stage, splittable):
    for _ in range(TIMES):
        with started(splittable, layout, stage) as ranks:
            pids = at_stage(ranks, stage, rank)
            os.kill(pids[rank], signal.SIGKILL)
            if rank > 0:
                assert_all_end(ranks, pids, rank)
            else:
                assert ranks.process.wait(ALL_GONE) == -signal.SIGKILL
                wait_until(lambda pids=pids: all(map(is_gone, pids)), "the end of all ranks", ALL_GONE)


@pytest.mark.parametrize("stage", ["prefill", "decode", "idle"])
def test_a_killed_rank_ends_all_over_gloo(stage, splittable):
    with started(splittable, "tp2pp2", stage, "--parallel-backend", "gloo") as ranks:
        pids = at_stage(ranks, stage, 2)
        os.kill(pids[2], signal.SIGKILL)
        assert_all_end(ranks, pids, 2)


# ---- a rank is stopped -----------------------------------------------------------------------------------------------


def stop_one(model: Path, layout: str, stage: str, rank: int, timeout: int) -> None:
    patience = timeout + 4 * ALL_GONE  # other ranks run beside these
    with started(model, layout, stage, "--rank-timeout", str(timeout)) as ranks:
        pids = at_stage(ranks, stage, rank)
        os.kill(pids[rank], signal.SIGSTOP)
        begin = time.monotonic()
        if rank == 0:  # cannot say anything until it goes on
            wait_until(lambda: all(map(is_gone, pids[1:])), "the end of the other ranks", patience)
            os.kill(pids[0], signal.SIGCONT)
            status, errors = ranks.end()
            assert status == 5 and errors.startswith("mixtral: rank "), errors
        else:
            status, errors = ranks.end(patience)
            assert status == 5, errors
            assert f"rank {rank} " in errors and errors.count("\n") == 1, errors
            assert time.monotonic() - begin >= timeout - 0.5
            wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", ALL_GONE)


@pytest.mark.parametrize("stage", ["prefill", "decode", "idle"])
def test_a_stopped_rank_ends_all_after_the_timeout(stage, splittable):
    """Several at a time: they mostly wait."""
    cases = TIMES * EVERY_RANK
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(stop_one, splittable, layout, stage, rank, 3) for layout, rank in cases]
    for run in runs:
        run.result()


def test_idle_ranks_stay_longer_than_the_timeout(splittable):
    with started(splittable, "tp2pp2", "idle", "--rank-timeout", "1") as ranks:
        ranks.until_idle(0)
        time.sleep(3)
        ranks.say("Hi")
        ranks._line()
        ranks.process.communicate(timeout=ALL_GONE)  # closes its input
        assert ranks.process.returncode == 0


# ---- a rank fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "rank"), [("tp2", 1), ("pp2", 1), ("tp2pp2", 3)])
def test_a_rank_without_memory_says_so(layout, rank, splittable):
    """The message is that of the rank that fails, and not that its connection broke."""
    with Ranks(splittable, LAYOUTS[layout], chunk_size=2048) as ranks:
        pids = ranks.until_idle(0)
        resource.prlimit(pids[rank], resource.RLIMIT_DATA, (0, 0))  # its heap cannot grow
        ranks.say("and it came to pass " * 400)
        errors = assert_all_end(ranks, pids, rank)
        assert "memory" in errors or "alloc" in errors, errors


def spoiled(model: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the model with one wrong weight in a tensor."""
    shutil.copytree(model, folder)
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_weight_that_only_one_rank_reads(splittable, tmp_path):
    name = "model.layers.3.block_sparse_moe.experts.7.w2.weight"  # of rank 1
    spoiled(splittable, tmp_path / "model", name, torch.nan)
    run = mixtral("generate", tmp_path / "model", "--tp", "2", "--check-weights", *GENERATE)
    assert run.returncode == 3 and run.stdout == b"", run.stderr
    assert name.encode() in run.stderr and run.stderr.count(b"\n") == 1


# ---- ranks that do not fit together ----------------------------------------------------------------------------------


def assert_all_refuse(runs: list, *words: str) -> None:
    for run in runs:
        assert run.returncode == 3 and run.stdout == b"", (run.returncode, run.stderr)
        assert run.stderr.startswith(b"mixtral: ") and run.stderr.count(b"\n") == 1, run.stderr
    for word in words:
        assert any(word in run.stderr.decode() for run in runs), [run.stderr for run in runs]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_shard_is_missing_on_one_rank(layout, splittable, tmp_path):
    shutil.copytree(splittable, tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00005.safetensors").unlink()
    command = [*LAYOUTS[layout], *GENERATE]
    runs = run_ranks(["generate", splittable, *command], ["generate", tmp_path / "model", *command])
    assert_all_refuse(runs, "model-00002-of-00005.safetensors")


def test_other_weights_on_one_rank(splittable, tmp_path):
    spoiled(splittable, tmp_path / "model", "model.layers.0.self_attn.q_proj.weight", 1.0)
    command = ["--tp", "2", *GENERATE]
    runs = run_ranks(["generate", splittable, *command], ["generate", tmp_path / "model", *command])
    assert_all_refuse(runs, "weights in the files")


def test_another_configuration_on_one_rank(splittable, tmp_path):
    shutil.copytree(splittable, tmp_path / "model")
    edit_config(tmp_path / "model", rope_theta=5e5)
    command = ["--pp", "2", *GENERATE]
    runs = run_ranks(["generate", splittable, *command], ["generate", tmp_path / "model", *command])
    assert_all_refuse(runs, "rope_theta", "rank 0", "rank 1")


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        (["--tp", "2"], ["--pp", "2"], "--pipeline-parallel-size"),
        (["--tp", "2"], ["--tp", "2", "--no-expert-parallel"], "--no-expert-parallel"),
        (["--tp", "2"], ["--tp", "2", "--dtype", "float32"], "float32"),
    ],
    ids=["layout", "experts", "dtype"],
)
def test_other_flags_on_one_rank(ours, theirs, word, splittable):
    runs = run_ranks(*(["generate", splittable, *flags, *GENERATE] for flags in (ours, theirs)))
    assert_all_refuse(runs, word)


def test_other_sizes_than_torchrun_has(splittable):
    for run in run_ranks(*(["generate", splittable, "--tp", "4", *GENERATE] for _ in range(2))):
        assert run.returncode == 3 and b"4" in run.stderr and b"2" in run.stderr, run.stderr


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (["--tp", "3"], ["3", "2"]),  # heads of keys and values
        (["--tp", "4"], ["4", "6"]),  # heads of the bundled model
        (["--pp", "5"], ["5", "4"]),  # layers
    ],
    ids=lambda value: " ".join(value),
)
def test_sizes_that_do_not_divide_the_model(flags, numbers):
    run = mixtral("generate", DEMO, *flags, *GENERATE)
    assert run.returncode == 3 and run.stderr.count(b"\n") == 1, run.stderr
    for number in numbers:
        assert number in run.stderr.decode()


def test_a_rank_that_never_comes(lonely_rank):
    _, errors = lonely_rank.communicate(timeout=90)
    assert lonely_rank.returncode == 5, errors
    assert errors == b"mixtral: rank 1 did not start within 60 s\n"


# ---- what others could reach -----------------------------------------------------------------------------------------

LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def test_ranks_in_shared_memory_listen_nowhere(splittable):
    with started(splittable, "tp2pp2", "idle") as ranks:
        assert listening_addresses(ranks.until_idle(0)) == set()


def test_ranks_of_one_host_listen_on_loopback_alone(splittable):
    with started(splittable, "tp2pp2", "idle", "--parallel-backend", "gloo") as ranks:
        addresses = listening_addresses(ranks.until_idle(0))
        assert addresses and addresses <= LOOPBACK
