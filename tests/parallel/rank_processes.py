"""Models in several processes: the binary with its ranks, which tests watch, stop and kill."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from binary import BINARY, DEMO, environment
from random_models import Shape, write_checkpoint

PATIENCE = 180.0  # seconds after which a wait has failed
ALL_GONE = 5.0  # seconds after the end of one rank in which the others must be gone
# Can be cut four ways; reading it takes long enough to be seen.
SPLITTABLE = Shape(hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, intermediate=1024, vocab=4096)
LAYOUTS = {
    "tp2": ["--tp", "2"],
    "tp4": ["--tensor-parallel-size", "4"],
    "pp2": ["--pp", "2"],
    "pp4": ["--pipeline-parallel-size", "4"],
    "tp2pp2": ["--tp", "2", "--pp", "2"],
}


def split_model(folder: Path) -> Path:
    """A model with random weights and the bundled tokenizer, in ``folder``."""
    write_checkpoint(SPLITTABLE, folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds:g} s"
        time.sleep(0.002)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in ("Z", "X")


def children_of(pid: int) -> list[int]:
    """Those that run, in the order in which they were started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
    return sorted(child for child in found if not is_gone(child))


def is_reading_weights(pid: int) -> bool:
    try:
        opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        mapped = Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return ".safetensors" in mapped or any(".safetensors" in name for name in opened)


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """Of the TCP sockets of these processes: as in /proc/net/tcp, an address of 32 or 128 bits in hexadecimal."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
            except FileNotFoundError:
                continue
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Ranks:
    """``mixtral chat`` whose messages come through a pipe, so that a test decides what its ranks do.

    It waits for a message, reads a long one token by token, or writes an answer without an end.
    """

    def __init__(self, model: Path, flags: list[str], max_tokens: int = 2, chunk_size: int = 1) -> None:
        command = [BINARY, "chat", model, *flags, "-n", str(max_tokens), "--ignore-eos"]
        command += ["--chunk-size", str(chunk_size)]
        self.process = subprocess.Popen(
            [*command, "--temp", "0", "-t", "1"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.size = 1
        for flag, number in zip(flags, flags[1:], strict=False):
            if flag in ("--tp", "--tensor-parallel-size", "--pp", "--pipeline-parallel-size"):
                self.size *= int(number)

    def pids(self) -> list[int]:
        """Of all ranks, once they are there."""
        wait_until(
            lambda: len(children_of(self.process.pid)) == self.size - 1 or self.process.poll() is not None,
            "starting the ranks",
        )
        assert self.process.poll() is None, self.process.stderr.read()
        return [self.process.pid, *children_of(self.process.pid)]

    def say(self, text: str) -> None:
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def until_init(self, rank: int) -> list[int]:
        """The ranks are being started."""
        count = max(rank, 1)
        wait_until(lambda: len(children_of(self.process.pid)) >= count, "starting the ranks")
        return [self.process.pid, *children_of(self.process.pid)]

    def until_load(self, rank: int) -> list[int]:
        """The rank reads weights."""
        pids = self.pids()
        wait_until(lambda: is_reading_weights(pids[rank]), "opening the weights")
        return pids

    def until_idle(self, rank: int) -> list[int]:
        """All wait for a message, after one was answered."""
        pids = self.pids()
        self.say("Hi")
        self._line()
        return pids

    def until_prefill(self, rank: int) -> list[int]:
        """A message of many passes is being read."""
        pids = self.until_idle(rank)
        self.say("and it came to pass " * 400)
        time.sleep(0.1)
        return pids

    def until_decode(self, rank: int) -> list[int]:
        """An answer is being written. ``max_tokens`` is large."""
        pids = self.pids()
        self.say("Hi")
        assert self.process.stdout.read(1), self.process.stderr.read()
        return pids

    def end(self, seconds: float = ALL_GONE) -> tuple[int, str]:
        """The exit status of rank 0, which ends within ``seconds``, and what it says on stderr."""
        self.process.wait(seconds)  # with its stdin open: a chat ends with that, too
        _, errors = self.process.communicate()
        return self.process.returncode, errors.decode()

    def _line(self) -> None:
        assert self.process.stdout.readline(), self.process.stderr.read()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in children_of(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def rank_environment(rank: int, size: int, port: int, **extra: str) -> dict[str, str]:
    """What torchrun sets."""
    return environment(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **extra,
    )


def start_ranks(*commands: list[object], size: int) -> list[subprocess.Popen]:
    """The binary with these arguments, one for each rank, as torchrun would start ``size`` of them."""
    port = free_port()
    return [
        subprocess.Popen(
            [BINARY, *map(str, command)],
            env=rank_environment(rank, size, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank, command in enumerate(commands)
    ]


def run_ranks(*commands: list[object]) -> list[subprocess.CompletedProcess]:
    """The same, when all have ended."""
    processes = start_ranks(*commands, size=len(commands))
    try:
        ended = [(*process.communicate(timeout=PATIENCE), process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for out, err, p in ended]


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.CompletedProcess:
    """``torchrun --standalone`` of the binary."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, "--no-python", BINARY, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=2 * PATIENCE,
    )
