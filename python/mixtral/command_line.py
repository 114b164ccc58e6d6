"""What the commands that Python runs share: exit codes, flags, errors as one line."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from .errors import LoadError

OK, USAGE, BAD_FILE, NO_MEMORY, RUN_TIME = 0, 2, 3, 4, 5


class Parser(argparse.ArgumentParser):
    """Flags of one command; a wrong one is a ValueError."""

    def __init__(self, command: str, description: str, epilog: str) -> None:
        super().__init__(
            f"mixtral {command}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see {self.prog} --help)")


def run_command(run: Callable[[], int]) -> int:
    """Calls ``run``; returns its exit status, or that of its exception, which becomes one line on stderr."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"mixtral: warning: {message}", file=sys.stderr)
            return run()
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
        no_memory = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"  # torch's
        return _fail(NO_MEMORY if no_memory else RUN_TIME, error)


def _fail(status: int, message: object) -> int:
    text = str(message).removeprefix("mixtral: ").partition("\n")[0]
    print(f"mixtral: {text}", file=sys.stderr)
    return status


def require_packages(command: str, packages: Sequence[str], extra: str) -> None:
    """Raises RuntimeError when one is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise RuntimeError(f"{command} needs {', '.join(missing)}: pip install 'mixtral[{extra}]'")
