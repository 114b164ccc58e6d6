"""``mixtral serve --trace FILE``: the routing of all requests in one trace file (docs/routing.md)."""

import logging
from pathlib import Path

from .. import _C
from ..model import Mixtral

log = logging.getLogger("mixtral.server")
MOST_TOKENS = 10_000_000  # of all requests: what comes later is not recorded, so that memory stays bounded


class Recorder:
    """Keeps the traces of the requests that have ended, also of those that were cancelled."""

    def __init__(self, model: Mixtral, path: str | Path) -> None:
        """Raises ValueError for a model without experts, or a folder that does not exist."""
        self._model, self._path = model, Path(path)
        if not model.config.is_moe:
            raise ValueError("--trace: the model has no experts, so there is nothing to trace")
        if not self._path.absolute().parent.is_dir():
            raise ValueError(f"--trace: there is no folder {self._path.absolute().parent}")
        self._traces: list[_C.RequestTrace] = []
        self._tokens = 0

    def add(self, outcome: _C.Outcome) -> None:
        """Leaves out requests with another ``experts_per_token`` than the model's: a file has one."""
        trace = outcome.trace
        if trace is None or trace.experts_per_token != self._model.config.top_k:
            return
        if self._tokens + len(trace) > MOST_TOKENS:
            return
        self._tokens += len(trace)
        self._traces.append(trace)

    def save(self) -> None:
        """Writes the file, each request a document. Logs why when it cannot be written."""
        model = self._model
        try:
            _C.write_request_traces(self._traces, model._model, model.tokenizer, model.config.top_k, self._path)
        except (OSError, RuntimeError) as error:
            log.error("the trace is lost: %s", error)
