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


SWITCH_VALUES = {
    **dict.fromkeys(("true", "on", "yes", "enable", "1"), True),
    **dict.fromkeys(("false", "off", "no", "disable", "0"), False),
}


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
        self._variables: dict[str, argparse.Action] = {}

    def add_flag(self, *names: str, help: str, **how: object) -> None:
        """An option that may also come from the environment, as in the binary: --ctx-size from MIXTRAL_CTX_SIZE."""
        variable = "MIXTRAL_" + names[-1].lstrip("-").replace("-", "_").upper()
        self._variables[variable] = self.add_argument(*names, help=f"{help} (env: {variable})", **how)

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        given = super().parse_intermixed_args(args, namespace)
        added = []
        for variable, action in self._variables.items():
            value, name = os.environ.get(variable), action.option_strings[-1]
            if not value or getattr(given, action.dest) != action.default:
                continue
            if action.nargs != 0:
                added.append(f"{name}={value}")
            elif value.lower() not in SWITCH_VALUES:
                self.error(f"{variable}: expected true or false, got {value}")
            elif SWITCH_VALUES[value.lower()]:
                added.append(name)
        return super().parse_intermixed_args([*added, *(sys.argv[1:] if args is None else args)], namespace)

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
