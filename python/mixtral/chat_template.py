"""Renders chat templates as transformers does it, with Jinja, and within limits of time and memory.

A template comes with a model, from anyone. Jinja's sandbox keeps it from the rest of Python, not from running for ever
or filling the memory. So it runs in a process of its own (_template_worker.py), which is ended after ``SECONDS``.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path

from .errors import LoadError

SECONDS = 2.0  # to render one template
START_SECONDS = 60.0  # to start the process, on a busy machine

Message = dict[str, object]

# Put behind the message that the model goes on with, and cut off again, as transformers does it.
_CUT = "CONTINUE_FINAL_MESSAGE_TAG "


def render(
    template: str, file: str, messages: list[Message], special_tokens: dict[str, str], closed: bool = False
) -> str:
    """The text of a conversation, up to where the model's answer begins.

    Args:
        template: Jinja.
        file: where it comes from, for errors.
        messages: with "role" and "content"; "prefix": True on the last one, an assistant's, makes the model go on with
            it.
        special_tokens: the template's variables ``bos_token``, ``eos_token`` and so on.
        closed: up to the end of the last message instead, with what the template puts behind it.

    Raises:
        ValueError: the template raises an exception; the message holds its words.
        LoadError: the template is no Jinja, fails, or takes more than 2 seconds, 512 MiB, or 16 MiB of text.
    """
    goes_on = bool(messages[-1].get("prefix"))
    shown = [{key: value for key, value in message.items() if key != "prefix"} for message in messages]
    if goes_on:
        shown[-1]["content"] = str(shown[-1]["content"]) + _CUT
    variables = dict(
        special_tokens, messages=shown, add_generation_prompt=not (goes_on or closed), tools=None, documents=None
    )
    answer = _worker.ask({"template": template, "variables": variables})
    if "text" in answer:
        return _cut(answer["text"]) if goes_on else answer["text"]
    if answer["error"] == "refused":
        raise ValueError(f"chat: the chat template says: {answer['message']}")
    reason = answer["message"]
    raise LoadError(f"{file}: chat_template: {reason}", file, "chat_template", reason)


def _cut(text: str) -> str:
    place = text.rfind(_CUT.strip())
    if place < 0:
        raise ValueError("chat: the chat template does not show the message that the model is to go on with")
    return text[:place] if text.startswith(_CUT, place) else text[:place].rstrip()


class _Worker:
    """The process; started when it is first needed, and anew after one that had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: dict[str, object]) -> dict[str, str]:
        with self._lock:
            alive = self._process is not None and self._process.poll() is None
            if not alive or self._owner != os.getpid():  # a fork has the parent's pipes
                self._start()
            answer = self._exchange(request, SECONDS)
        if answer is None:
            return {"error": "limit", "message": f"takes more than {SECONDS:g} seconds or too much memory to render"}
        return answer

    def _start(self) -> None:
        script = str(Path(__file__).with_name("_template_worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._owner = os.getpid()
        if self._exchange({"path": sys.path}, START_SECONDS) is None:
            raise RuntimeError("mixtral: chat templates need jinja2 3.1 or later: pip install jinja2")

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

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


_worker = _Worker()
atexit.register(_worker.stop)
