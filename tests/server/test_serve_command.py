"""``mixtral serve`` as users start it: flags, the environment, the line that says where it is, and what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from mixtral.server import command

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("MIXTRAL_BINARY", ROOT / "build" / "bin" / "mixtral"))


@pytest.mark.parametrize("start", [[sys.executable, "-m", "mixtral"], [str(BINARY)]], ids=["python", "binary"])
def test_serves_the_bundled_model_until_a_signal_comes(start):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "python"),
        "MIXTRAL_PYTHON": sys.executable,
        "MIXTRAL_SERVED_MODEL_NAME": "from-the-environment",
        "MIXTRAL_PORT": "1",  # the flag goes before it
    }
    del environment["OMP_WAIT_POLICY"]  # of the tests
    process = subprocess.Popen(
        [*start, "serve", "--port", "0", "--threads", "1"], env=environment, stdout=subprocess.PIPE, text=True
    )
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("mixtral: ready at http://127.0.0.1:"), line
        url = line.split()[-1]
        assert b"GOMP_SPINCOUNT=1000" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        body = {"messages": [{"role": "user", "content": "Who made the heavens?"}], "max_tokens": 8}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer = json.load(answer)
        assert answer["model"] == "from-the-environment" and answer["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""  # one line is all it says there
        assert process.wait(60) == 0
    finally:
        alarm.cancel()
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "argument --port: must be in [0, 65535], got 70000"),
        (["--queue", "0"], "argument --queue: must be >= 1, got 0"),
        (["--kv-memory", "much"], "argument --kv-memory: must be a size such as 4GiB, got much"),
        (["--kv-memory", "0"], "argument --kv-memory: must be a size such as 4GiB, got 0"),
        (["--dtype", "float7"], "argument --dtype: invalid choice: 'float7'"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000: cannot listen there: "),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_refuses_a_wrong_flag_in_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"mixtral: {message}")


def test_refuses_a_wrong_value_of_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("MIXTRAL_DTYPE", "float7")
    assert command.main([]) == 2
    assert "MIXTRAL_DTYPE expected one of auto, float32" in capsys.readouterr().err


def test_says_that_a_port_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["--port", str(port)]) == 2
    message = f"mixtral: --host 127.0.0.1 --port {port}: cannot listen there: Address already in use"
    assert capsys.readouterr().err.startswith(message)


def test_no_prefix_cache_computes_every_prompt_whole():
    for arguments, cached in (([], 32), (["--no-prefix-cache"], 0)):
        model, _ = command._load(command._parser().parse_args(arguments))
        for _ in range(2):
            model.generate([list(range(3, 40))], max_tokens=1)
        assert model.timings.cached_tokens == cached


def test_sizes_are_read_as_they_are_written():
    sizes = {"4GiB": 2**32, "1.5g": 3 * 2**29, "512MiB": 2**29, "512mb": 2**29, "64k": 2**16, "123": 123, "2T": 2**41}
    assert {text: command._size(text) for text in sizes} == sizes


def test_a_trace_to_replay_is_read_before_the_server_is_ready(tmp_path, capfd):
    (tmp_path / "t").write_bytes(b"\x7fELF" + bytes(64))
    assert command.main(["--port", "0", "--threads", "1", "--replay", str(tmp_path / "t")]) == 3
    out, err = capfd.readouterr()
    assert out == "" and f"mixtral: {tmp_path / 't'}" in err.splitlines()[-1]
