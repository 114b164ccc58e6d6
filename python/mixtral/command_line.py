"""What the commands that Python runs share: exit codes, errors of one line, a bar that shows how far the work is."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable

from .errors import LoadError

OK, USAGE, BAD_FILE, NO_MEMORY, RUN_TIME = 0, 2, 3, 4, 5


class Parser(argparse.ArgumentParser):
    """Raises ValueError where the parser of the standard library ends the process."""

    def __init__(self, command: str, **options: object) -> None:
        super().__init__(command, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see {self.prog} --help)")


def run_command(run: Callable[[], int | None]) -> int:
    """The exit status of ``run``, whose errors and warnings are one line on stderr each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"mixtral: warning: {message}", file=sys.stderr)
            return run() or OK
    except SystemExit as exit_:  # --help, SIGTERM
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        return _fail(128 + signal.SIGINT, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except LoadError as error:
        return _fail(BAD_FILE, error)
    except MemoryError as error:
        return _fail(NO_MEMORY, error or "out of memory")
    except ValueError as error:
        return _fail(USAGE, error)
    except (OSError, RuntimeError, ImportError) as error:
        return _fail(RUN_TIME, error)


def _fail(status: int, message: object) -> int:
    text = str(message).removeprefix("mixtral: ").partition("\n")[0]
    print(f"mixtral: {text}", file=sys.stderr)
    return status
