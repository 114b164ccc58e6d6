"""The commands of the binary on a model in several processes: what they write is what one process writes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from binary import BINARY, DEMO, environment, mixtral, ok, ok_json
from rank_processes import LAYOUTS, Ranks, children_of, is_gone, torchrun, wait_until

pytest_plugins = ["parallel_fixtures"]

PROMPT = ["-p", "In the beginning God created", "-n", "24", "--ignore-eos", "--logprobs", "3"]
TEXT = Path(__file__)  # a text


def generated(*arguments: object) -> dict[str, object]:
    return without_times(ok_json("generate", *arguments, *PROMPT))


def without_times(result: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in result.items() if name not in ("timings", "parallel")}


@pytest.fixture(scope="module")
def alone(splittable: Path) -> dict[str, object]:
    """By one process."""
    return generated(splittable)


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_logprobs_are_those_of_one_process(layout, backend, splittable, alone):
    assert generated(splittable, *LAYOUTS[layout], "--parallel-backend", backend) == alone


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_other_weights(dtype, splittable):
    expected = generated(splittable, "--dtype", dtype)
    assert generated(splittable, "--dtype", dtype, *LAYOUTS["tp2pp2"]) == expected


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2pp2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_mapped_weights(layout, dtype, splittable, tmp_path):
    ok("quantize", splittable, tmp_path / "packed", "--dtype", dtype)
    alone = generated(tmp_path / "packed")
    run = mixtral("generate", tmp_path / "packed", "--weights", "mmap", *LAYOUTS[layout], *PROMPT, "--json")
    assert run.returncode == 0 and without_times(json.loads(run.stdout)) == alone
    # Queries, keys and values of one of two ranks lie in three places of the file.
    said = b"are read, not mapped, among them layers." in run.stderr
    assert said == layout.startswith("tp") and b"moe" not in run.stderr


def test_cut_experts_round_otherwise_and_are_close(splittable, alone):
    cut = generated(splittable, "--tp", "2", "--no-expert-parallel", "--dtype", "float32")
    whole = generated(splittable, "--dtype", "float32")
    assert cut["token_ids"][:4] == whole["token_ids"][:4]
    for ours, theirs in zip(cut["logprobs"][:4], whole["logprobs"][:4], strict=True):
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_torchrun(backend, splittable, alone):
    run = torchrun("generate", splittable, "--tp", "2", "--parallel-backend", backend, "--json", *PROMPT)
    assert run.returncode == 0, run.stderr
    assert without_times(json.loads(run.stdout)) == alone  # rank 0 alone writes


def test_json_says_the_layout(splittable):
    layout = ok_json("generate", splittable, "--tp", "2", "--pp", "2", *PROMPT)["parallel"]
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel": True}
    assert layout == {**sizes, "backend": "shm"}
    bench = ok_json("bench", "--pp", "2", "--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1", "-t", "1")
    assert bench["parallel"]["pipeline_parallel_size"] == 2 and bench["decode_tokens_per_second"] > 0
    assert "parallel" not in ok_json("generate", *PROMPT)


def test_the_prompt_is_read_once(splittable, alone):
    """Ranks have the arguments of the first one, but not its stdin."""
    text = PROMPT[1].encode()
    assert without_times(ok_json("generate", splittable, *LAYOUTS["tp2"], *PROMPT[2:], stdin=text)) == alone


def test_flags_may_come_from_the_environment(splittable, alone):
    variables = environment(MIXTRAL_TENSOR_PARALLEL_SIZE="2", MIXTRAL_PIPELINE_PARALLEL_SIZE="2")
    result = ok_json("generate", splittable, *PROMPT, env=variables)
    assert without_times(result) == alone and result["parallel"]["tensor_parallel_size"] == 2


def test_chat(splittable):
    chat = ["chat", splittable, "--temp", "0", "-n", "12", "--ignore-eos"]
    messages = b"Who made the heavens?\nAnd who the earth?\n"
    assert ok(*chat, *LAYOUTS["pp2"], stdin=messages) == ok(*chat, stdin=messages)


def test_perplexity():
    def score(*flags: str) -> dict[str, object]:
        return {**ok_json("perplexity", DEMO, TEXT, "--chunk-size", "100", *flags), "seconds": None}

    assert score(*LAYOUTS["tp2"]) == score(*LAYOUTS["pp2"]) == score()


def test_perplexity_by_context():
    def score(*flags: str) -> dict[str, object]:
        return {**ok_json("perplexity", DEMO, TEXT, "--contexts", "64,128", *flags), "seconds": None}

    assert score(*LAYOUTS["tp2pp2"]) == score()


def test_passkey():
    arguments = ["passkey", DEMO, "--lengths", "128", "--depths", "2", "--trials", "1"]
    assert ok_json(*arguments, *LAYOUTS["tp2"]) == ok_json(*arguments)


@pytest.mark.parametrize(
    "command",
    [
        ["tokenize", "-p", "a"],
        ["quantize", DEMO, "/nonexistent/out", "--dtype", "int8"],
        ["convert", DEMO, "/nonexistent/out"],
        ["reach"],
    ],
    ids=lambda command: command[0],
)
def test_commands_without_ranks_refuse_the_flags(command):
    run = mixtral(*command, "--tp", "2")
    assert run.returncode == 2 and run.stderr.startswith(b"mixtral: "), run.stderr
    assert b"--tp" in run.stderr and run.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--tp", "0", "-p", "a"], ["--tensor-parallel-size", "0"]),
        (["generate", "--pp", "many", "-p", "a"], ["--pipeline-parallel-size", "many"]),
        (["generate", "--tp", "2", "--parallel-backend", "mpi", "-p", "a"], ["--parallel-backend", "mpi"]),
        (["generate", "--tp", "2", "--rank-timeout", "0", "-p", "a"], ["--rank-timeout", "0"]),
        (["perplexity", DEMO, __file__, "--tp", "2", "--compare-dtype", "int8"], ["--compare-dtype", "one process"]),
    ],
    ids=lambda value: " ".join(map(str, value[:5])) if value[0] in ("generate", "perplexity") else None,
)
def test_wrong_usage_exits_with_2(arguments, words):
    run = mixtral(*arguments)
    assert run.returncode == 2 and run.stderr.count(b"\n") == 1, run.stderr
    for word in words:
        assert word in run.stderr.decode()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["idle", "decode"])
def test_a_signal_ends_all_ranks(number, code, stage, splittable):
    with Ranks(splittable, LAYOUTS["tp2pp2"], max_tokens=2 if stage == "idle" else 3000) as ranks:
        pids = getattr(ranks, f"until_{stage}")(0)
        ranks.process.send_signal(number)
        status, errors = ranks.end()
        assert status == code
        assert errors in ("mixtral: interrupted\n", "")  # silent where it takes 0.8 s, as on a busy machine
        wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", 2)


def test_ctrl_c_on_a_terminal_is_for_rank_0(splittable):
    """It reaches all processes of the terminal's group."""
    command = [BINARY, "generate", splittable, "--tp", "2", "-p", "Once", "-n", "3000", "--ignore-eos"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.read(1), process.stderr.read()
    pids = children_of(process.pid)
    for pid in pids:
        subprocess.run(["kill", "-INT", str(pid)], check=True)
    time.sleep(0.2)
    assert process.poll() is None and not any(map(is_gone, pids))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and errors == b"mixtral: interrupted\n"
    wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", 2)
