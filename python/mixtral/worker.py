"""A process of its own for work that strangers' inputs decide: it can be ended when it takes too long."""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path

START_SECONDS = 60.0  # to start the process, on a busy machine


class Worker:
    """Asks a script, one JSON object a line each way. It is started when first needed, and anew after it was ended.

    The first line that the script gets is {"path": sys.path}; it answers anything once it is ready.
    """

    def __init__(self, script: Path, seconds: float, needs: str) -> None:
        """
        Args:
            script: run with ``python -I -S``.
            seconds: that an answer may take.
            needs: what to install when the script does not start, such as "jinja2 3.1 or later: pip install jinja2".
        """
        self._script, self._seconds, self._needs = script, seconds, needs
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.stop)

    def ask(self, request: dict[str, object]) -> dict[str, str] | None:
        """The answer; None when there was none in time, or the process died of the question.

        Raises:
            RuntimeError: the script does not start.
        """
        with self._lock:
            alive = self._process is not None and self._process.poll() is None
            if not alive or self._owner != os.getpid():  # a fork has the parent's pipes
                self._start()
            return self._exchange(request, self._seconds)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._owner = os.getpid()
        if self._exchange({"path": sys.path}, START_SECONDS) is None:
            raise RuntimeError(f"mixtral: {self._needs}")

    def _exchange(self, request: dict[str, object], seconds: float) -> dict[str, str] | None:
        """The answer; None, and the process is gone, when there is none in time."""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(time.monotonic() + seconds)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.stop()
            return None
        return json.loads(line)

    def _read_line(self, deadline: float) -> bytes:
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(max(0.0, deadline - time.monotonic())):
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                line += part
        return line
