"""A client of /v1/completions, and of chats for their text, that accounts for every request: what came, when, how it
ended. Plain asyncio."""

import asyncio
import json
import time
from dataclasses import dataclass, field

DONE = "[DONE]"


@dataclass
class Outcome:
    """How one request ended. Times are of ``time.perf_counter``.

    Attributes:
        status: of HTTP; 0 when the connection ended before there was one.
        choices: of a whole answer; of a stream, one that its events add up to.
        error: of the answer or of the stream.
        ends: terminal events of a stream: [DONE] and errors. Of a whole answer, 1.
        cut: this side closed the connection.
        start, events: when it was sent, and when text or tokens came.
        tokens: new ones, by the answer's usage.
    """

    status: int = 0
    choices: list[dict] = field(default_factory=list)
    error: dict | None = None
    ends: int = 0
    cut: bool = False
    start: float = 0.0
    events: list[float] = field(default_factory=list)
    tokens: int = 0


class Client:
    """One connection, which is opened when it is needed and kept."""

    def __init__(self, host: str, port: int, path: str = "/v1/completions", key: str | None = None) -> None:
        self.host, self.port, self.path = host, port, path
        self.key = f"authorization: Bearer {key}\r\n" if key else ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: dict | bytes, cut_after: int | None = None, deadline: float = 300.0) -> Outcome:
        """
        Args:
            cut_after: close the connection after so many events of a stream, or milliseconds before a whole answer.
            deadline: seconds after which the request counts as not ended.
        """
        outcome = Outcome()
        try:
            await asyncio.wait_for(self._post(body, cut_after, outcome), deadline)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            self.close()
        return outcome

    async def _post(self, body: dict | bytes, cut_after: int | None, outcome: Outcome) -> None:
        if self._streams is None or self._streams[0].at_eof():
            self._streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._streams
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: {self.host}\r\n{self.key}content-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        outcome.start = time.perf_counter()
        writer.write(head.encode() + data)
        streamed = isinstance(body, dict) and body.get("stream", False)
        if cut_after is not None and not streamed:
            outcome.cut = True
            await asyncio.sleep(0.001 * cut_after)
            return self.close()
        outcome.status, fields = await _head(reader)
        if fields.get("content-type", "").startswith("text/event-stream"):
            await self._read_stream(reader, cut_after, outcome)
        else:
            _set_answer(outcome, json.loads(await _body(reader, fields)))
        if fields.get("connection") == "close":
            self.close()

    async def _read_stream(self, reader: asyncio.StreamReader, cut_after: int | None, outcome: Outcome) -> None:
        events = 0
        while chunk := await _chunk(reader):
            now = time.perf_counter()
            for text in chunk.decode().replace("\r\n", "\n").split("\n\n"):
                if text.startswith("data: "):
                    _add_event(outcome, text.removeprefix("data: "), now)
                    events += 1
            if cut_after is not None and events > cut_after:
                outcome.cut = True
                return self.close()

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def _body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
    if "content-length" in fields:
        return await reader.readexactly(int(fields["content-length"]))
    chunks = []
    while chunk := await _chunk(reader):
        chunks.append(chunk)
    return b"".join(chunks)


def _set_answer(outcome: Outcome, answer: dict) -> None:
    outcome.ends = 1
    outcome.error = answer.get("error")
    outcome.choices = answer.get("choices", [])
    outcome.tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
    outcome.events.append(time.perf_counter())


def _add_event(outcome: Outcome, text: str, now: float) -> None:
    if text == DONE:
        outcome.ends += 1
        return
    event = json.loads(text)
    if "error" in event:
        outcome.ends += 1
        outcome.error = event["error"]
        return
    if usage := event.get("usage"):
        outcome.tokens = usage["completion_tokens"]
    for piece in event["choices"]:
        outcome.events.append(now)
        while len(outcome.choices) <= piece["index"]:
            outcome.choices.append({"index": len(outcome.choices), "text": "", "logprobs": None, "finish_reason": None})
        _append(outcome.choices[piece["index"]], piece)


def _append(choice: dict, piece: dict) -> None:
    choice["text"] += piece["text"] if "text" in piece else piece["delta"].get("content") or ""
    choice["finish_reason"] = choice["finish_reason"] or piece["finish_reason"]
    if piece.get("logprobs"):
        if choice["logprobs"] is None:
            choice["logprobs"] = {name: [] for name in piece["logprobs"]}
        for name, values in piece["logprobs"].items():
            choice["logprobs"][name] += values or []
