"""SIGINT and SIGTERM end a run between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .parallel import Ranks


class Pending:
    """The signal that asked the run to stop."""

    def __init__(self) -> None:
        self._number = 0

    def receive(self, number: int, _frame: object) -> None:
        if self._number:  # a second one does not wait for the step
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self._number = number

    def number(self, ranks: Ranks) -> int:
        """SIGINT, SIGTERM or 0, of any rank: all stop after the same step."""
        return int(ranks.largest(self._number))


@contextmanager
def stop_signals() -> Iterator[Pending]:
    """SIGINT and SIGTERM wait for the end of the step."""
    pending = Pending()
    before = {number: signal.signal(number, pending.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
