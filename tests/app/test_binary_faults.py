"""The `mixtral` binary when things go wrong: exit codes, broken pipes, little memory, signals."""

import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from binary import BINARY, DEMO, edit_config, environment, mixtral, ok_json

LONG_PASS = ["bench", "--prompt-tokens", "4000", "--chunk-size", "4096", "--batch", "8", "--new-tokens", "2", "-t", "1"]
LONG_TEXT = ["perplexity", DEMO / "tokenizer.json"]
ENDLESS = ["generate", "-p", "Once", "-n", "4000", "--ignore-eos"]


def assert_fails(run: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """Exit ``code`` and one line on stderr that has all ``words`` in it."""
    message = run.stderr.decode()
    assert run.returncode == code, message
    assert message.startswith("mixtral: ") and message.count("\n") == 1, message
    for word in words:
        assert word in message


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


# ---- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["command"]),
        (["generat"], ["unknown command generat", "did you mean generate?"]),
        (["--nosuch"], ["a command is needed before --nosuch"]),
        (["generate", "--max-token", "3", "-p", "a"], ["--max-token", "did you mean --max-tokens?"]),
        (["generate", "--max-tokens", "-1", "-p", "a"], ["max_tokens", "-1"]),
        (["generate", "-n", "many", "-p", "a"], ["many"]),
        (["generate", "--temp", "-1", "-p", "a"], ["temperature", "-1"]),
        (["generate", "--top-p", "0", "-p", "a"], ["top_p"]),
        (["generate", "--logprobs", "21", "--json", "-p", "a"], ["21"]),
        (["generate", "--logprobs", "2", "-p", "a"], ["--json"]),
        (["generate", "--device", "tpu", "-p", "a"], ["tpu"]),
        (["generate", "--dtype", "int3", "-p", "a"], ["int3"]),
        (["generate", "-c", "-5", "-p", "a"], ["-5"]),
        (["generate", "-p", ""], ["empty"]),
        (["generate"], ["empty"]),  # empty stdin
        (["generate", "-p", "a", "-f", "b"], ["exclude"]),
        (["generate", "-f", "/nonexistent/prompt"], ["/nonexistent/prompt"]),
        (["generate", "-p", "one two three", "-c", "6", "-n", "5"], ["--max-tokens 5", "context of 6"]),
        (["generate", "-p", "word " * 30, "-c", "20"], ["prompt of", "does not fit the context of 20"]),
        (["generate", "-p", "a", "-ngl", "99"], ["-ngl: use --device cuda"]),
        (["generate", "-p", "a", "--repeat-penalty=2"], ["--repeat-penalty: use --repetition-penalty"]),
        (["generate", "demo", "a prompt"], ["a prompt", "-p TEXT"]),
        (["chat", "-p", "Hello"], ["-p: messages come from stdin"]),
        (["generate", "-p", "a", "-n", "99999999999999999999"], ["do not fit the context"]),
        (["run", "demo"], ["mixtral chat or mixtral generate"]),
        (["-m", "demo"], ["command", "generate -m"]),
        (["generate", "-p", "a", "-n", "abc"], ["--max-tokens must be a number, got abc"]),
        (["generate", "-p", "a", "-c", "-1"], ["--ctx-size: must be >= 0, got -1"]),
        (["generate", "-p", "a", "-t", "5000"], ["--threads: must be in [0, 4096], got 5000"]),
        (["generate", "-p", "a", "-s", "-2"], ["--seed must be -1 or in [0, 2^64), got -2"]),
        (["info", "one", "two"], ["two"]),
        (["bench", "--new-tokens", "1"], ["1"]),
        (["chat", "--min-p", "2"], ["min_p"]),
        (["perplexity"], ["FILE"]),
        (["perplexity", "/nonexistent/text"], ["cannot open /nonexistent/text"]),
        (["perplexity", "/dev/null"], ["FILE must not be empty", "/dev/null"]),
        (["perplexity", "one", "two", "three"], ["three"]),
        (["perplexity", "/etc/hostname", "--compare-dtype", "int3"], ["int3"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_exits_with_2(arguments, words):
    assert_fails(mixtral(*arguments), 2, *words)


def test_too_long_prompt_names_both_lengths_before_the_weights_are_read(model):
    (model / "model.safetensors").unlink()
    length = len(ok_json("tokenize", "-p", "word " * 50)["token_ids"])
    run = mixtral("generate", model, "-p", "word " * 50, "-n", "30", "-c", "60")
    assert_fails(run, 2, f"{length} tokens", "60 tokens")


def test_utf16_is_named():
    assert_fails(mixtral("tokenize", stdin="Hello".encode("utf-16")), 2, "stdin is UTF-16: save it as UTF-8")


def test_missing_model_exits_with_3(tmp_path):
    for command in [["info"], ["generate", "-p", "a"], ["tokenize", "-p", "a"], ["chat"], ["bench"]]:
        assert_fails(mixtral(*command, tmp_path / "nothing"), 3, "nothing")
    assert_fails(mixtral("perplexity", tmp_path / "nothing", __file__), 3, "nothing")
    assert_fails(mixtral("info", env=environment(MIXTRAL_DEMO_MODEL="/nonexistent")), 3, "/nonexistent")
    assert_fails(mixtral("info", "-m", "/dev/null"), 3, "/dev/null")


def truncate_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 5_000_000)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate_weights, "model.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda model: (model / "config.json").write_text("{"), "config.json"),
        (lambda model: edit_config(model, num_experts_per_tok=9), "num_experts_per_tok"),
        (lambda model: edit_config(model, hidden_size=256), "hidden_size"),
        (lambda model: (model / "tokenizer.model").write_bytes(b"\0" * 100), "tokenizer.model"),
        (lambda model: [path.unlink() for path in model.glob("tokenizer.*")], "no tokenizer"),
    ],
    ids=["truncated", "empty", "config", "top_k", "shape", "tokenizer", "no_tokenizer"],
)
def test_damaged_model_exits_with_3(model, damage: Callable[[Path], object], word):
    damage(model)
    run = mixtral("generate", model, "-p", "a", "-n", "2")
    assert_fails(run, 3)
    assert run.stdout == b""
    if word != "hidden_size":  # seen as a wrong shape of some tensor
        assert word in run.stderr.decode()


def test_nan_logits_exit_with_5(model):
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][5] = float("nan")
    save_file(tensors, model / "model.safetensors")
    for command in [["generate", model, "-p", "a", "-n", "2"], ["perplexity", model, __file__]]:
        run = mixtral(*command)
        assert run.returncode == 5 and "nan" in run.stderr.decode().splitlines()[-1].lower(), run.stderr


def test_full_disk_exits_with_5():
    with open("/dev/full", "wb") as full:
        assert_fails(mixtral("generate", "-p", "a", "-n", "2", stdout=full), 5, "No space left")
        assert_fails(mixtral("info", stdout=full), 5, "No space left")


def test_reader_that_leaves_is_no_error():
    process = subprocess.Popen([BINARY, *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


# ---- memory ----------------------------------------------------------------------------------------------------------


def run_within(mebibytes: int) -> subprocess.CompletedProcess:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    return mixtral("generate", "-p", "a", "-n", "2", "-t", "2", preexec_fn=limit)


def test_little_address_space_exits_with_4():
    # Before main, NVIDIA's libraries register kernels and do not check their allocations, or end the program with a C++
    # runtime of their own: a build with CUDA kernels may crash there, which nothing of ours can turn into a message.
    with_cuda = "libtorch_cuda" in subprocess.run(["ldd", BINARY], capture_output=True, text=True).stdout
    crashes_before_main = {-signal.SIGSEGV, -signal.SIGABRT} if with_cuda else set()
    too_small, enough = 16, 4096  # MiB, for the dynamic loader to map libtorch: it exits with 127 by itself
    while enough - too_small > 8:
        middle = (too_small + enough) // 2
        too_small, enough = (middle, enough) if run_within(middle).returncode == 127 else (too_small, middle)
    codes = []
    for more in [0, 8, 16, 24, 32, 40, 56, 72, 104, 136, 4096]:
        run = run_within(enough + more)
        if run.returncode in crashes_before_main:
            continue
        assert run.returncode in (0, 4), (more, run.returncode, run.stderr)
        assert len(run.stderr.strip().splitlines()) == (run.returncode == 4), run.stderr
        codes.append(run.returncode)
    assert codes[0] == 4 and codes[-1] == 0


FAILING_NEW = r"""
#include <atomic>
#include <cstdlib>
#include <new>
static std::atomic<long> calls{0};
void* operator new(std::size_t size) {
  static const long fail_at = std::atol(std::getenv("FAIL_AT"));
  if (++calls == fail_at) throw std::bad_alloc();
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
"""


def test_failed_allocation_never_aborts(tmp_path):
    (tmp_path / "new.cpp").write_text(FAILING_NEW)
    library = tmp_path / "new.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-O1", tmp_path / "new.cpp", "-o", library], check=True)
    codes = []
    for count in [1, 2, 20, 200, 20_000, 200_000, 300_000, 400_000, 10**9]:
        variables = environment(LD_PRELOAD=str(library), FAIL_AT=str(count))
        run = mixtral("generate", "-p", "a", "-n", "2", env=variables)
        assert run.returncode in (0, 4), (count, run.returncode, run.stderr)
        codes.append(run.returncode)
    assert codes[0] == 4 and codes[-1] == 0


def test_cache_that_cannot_fit_exits_with_4(model):
    edit_config(model, sliding_window=None, max_position_embeddings=2**31 - 1)
    assert_fails(mixtral("generate", model, "-p", "a", "-n", "2000000000"), 4, "cache", "GiB")


# ---- signals and terminals -------------------------------------------------------------------------------------------


def leaves_in_time(process: subprocess.Popen, number: signal.Signals) -> int:
    start = time.monotonic()
    process.send_signal(number)
    code = process.wait(30)
    assert time.monotonic() - start < 1.5  # 1 s, and what a busy machine adds
    return code


def wait_for_handler(process: subprocess.Popen, number: signal.Signals) -> None:
    caught = 0
    while not caught >> (number - 1) & 1:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "arguments",
    [ENDLESS, ["generate"], ["chat"], LONG_PASS, LONG_TEXT],
    ids=["decoding", "reading", "chatting", "in_one_long_forward_pass", "scoring"],
)
def test_signal_ends_the_program(arguments, number, code):
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    process = subprocess.Popen([BINARY, *arguments], **options)
    if arguments == ["chat"]:
        process.stdin.write(b"Once\n")
        process.stdin.flush()
    if arguments in (ENDLESS, ["chat"]):
        process.stdout.read(1)
    else:
        wait_for_handler(process, number)
    if arguments in (LONG_PASS, LONG_TEXT):
        time.sleep(1)  # the model is loaded; a pass, or the text, takes seconds
    assert leaves_in_time(process, number) == code
    assert process.stderr.read().count(b"\n") <= 1


def test_progress_is_shown_on_a_terminal_and_wiped_away():
    ours, theirs = pty.openpty()
    process = subprocess.Popen([BINARY, *LONG_TEXT], stdout=subprocess.PIPE, stderr=theirs, env=environment())
    os.close(theirs)
    shown = read_until(ours, b" tokens/s")
    assert re.search(rb"\rscoring \[#* *\] +\d+% of \d+ tokens, \d+ tokens/s$", shown), shown
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert os.read(ours, 10_000).replace(b"\r\n", b"\n").endswith(b"\r\x1b[Kmixtral: interrupted\n")
    os.close(ours)


@pytest.fixture
def terminal_chat() -> Iterator[tuple[subprocess.Popen, int]]:
    """A chat on a terminal, past its first prompt; and the other end of the terminal."""
    ours, theirs = pty.openpty()
    arguments = [BINARY, "chat", "-n", "4000", "--ignore-eos"]
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    read_until(ours, b"> ")
    yield process, ours
    process.kill()
    process.wait()
    os.close(ours)


def read_until(terminal: int, mark: bytes) -> bytes:
    text = b""
    while not text.endswith(mark):
        assert select.select([terminal], [], [], 30)[0], text
        text += os.read(terminal, 1)
    return text


def test_ctrl_c_stops_the_answer_and_bye_leaves(terminal_chat):
    process, terminal = terminal_chat
    os.write(terminal, b"Once upon a time\n")
    read_until(terminal, b"\n")  # the echo
    os.read(terminal, 1)
    process.send_signal(signal.SIGINT)
    read_until(terminal, b"\n> ")
    os.write(terminal, b"/bye\n")
    assert process.wait(30) == 0


def test_second_ctrl_c_and_ctrl_d_leave(terminal_chat):
    process, terminal = terminal_chat
    process.send_signal(signal.SIGINT)
    read_until(terminal, b"\n> ")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_ctrl_d_leaves(terminal_chat):
    process, terminal = terminal_chat
    os.write(terminal, b"\x04")
    assert process.wait(30) == 0
