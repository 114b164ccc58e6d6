"""Two hosts, as far as one machine can be two: network namespaces with a cable between them, a torchrun in each."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from binary import BINARY, DEMO, environment, ok_json

FIRST, SECOND = "mixtral-test-0", "mixtral-test-1"
ADDRESSES = {FIRST: "10.213.77.1", SECOND: "10.213.77.2"}
PROMPT = ["-p", "In the beginning", "-n", "16", "--ignore-eos", "--json"]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove() -> None:
    for host in ADDRESSES:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other and nothing else."""
    try:
        remove()
        for host in ADDRESSES:
            ip("netns", "add", host)
        ip("link", "add", "veth", "netns", FIRST, "type", "veth", "peer", "name", "veth", "netns", SECOND)
        for host, address in ADDRESSES.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "veth")
            for link in ("lo", "veth"):
                ip("-n", host, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove()
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield list(ADDRESSES)
    remove()


def agent(host: str, rank: int, *arguments: object, **extra: str) -> subprocess.Popen:
    """A torchrun on ``host``, which starts one rank of the binary there."""
    rendezvous = ["--master-addr", ADDRESSES[FIRST], "--master-port", "29511"]
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), *rendezvous, "--no-python"]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *launch, BINARY]
        + [os.fspath(argument) for argument in arguments],
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("layout", [["--tp", "2"], ["--pp", "2"]], ids=["tp2", "pp2"])
def test_two_hosts_write_what_one_process_does(layout, hosts):
    begin = time.monotonic()
    agents = [agent(host, rank, "generate", DEMO, *layout, *PROMPT) for rank, host in enumerate(hosts)]
    try:
        outputs = [process.communicate(timeout=60) for process in agents]
    finally:
        for process in agents:
            process.kill()
    assert [process.returncode for process in agents] == [0, 0], outputs
    result, expected = json.loads(outputs[0][0]), ok_json("generate", DEMO, *PROMPT[:-1])
    assert result["token_ids"] == expected["token_ids"] and outputs[1][0] == b""
    assert result["parallel"]["backend"] == "gloo"
    assert time.monotonic() - begin < 30


def test_a_shard_is_missing_on_the_second_host(hosts, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(DEMO).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    command = ["--tp", "2", *PROMPT]
    agents = [agent(host, n, "generate", (DEMO, folder)[n], *command) for n, host in enumerate(hosts)]
    try:
        outputs = [process.communicate(timeout=60) for process in agents]
    finally:
        for process in agents:
            process.kill()
    for process, (out, errors) in zip(agents, outputs, strict=True):
        assert process.returncode != 0 and out == b""
        assert b"mixtral: " in errors and b"exitcode  : 3" in errors, errors
