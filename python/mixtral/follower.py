"""The processes that ``Mixtral.from_pretrained`` starts beside its own, one for each further rank of a model.

They run this module and not the program of the user, and take the arguments of ``from_pretrained`` as JSON.
"""

import json
import os
import signal
import sys
import warnings

from .command_line import BAD_FILE, NO_MEMORY, RUN_TIME

# The modules are found where the first process found them.
PROGRAM = """\
import json, sys
arguments = json.loads(sys.argv[1])
sys.path[:] = arguments.pop("sys.path")
from mixtral.follower import main
main(arguments)"""


def command(threads: int, **arguments: object) -> list[str]:
    """What starts such a process.

    Args:
        threads: of its operators.
        arguments: of ``Mixtral.from_pretrained``.
    """
    return [sys.executable, "-c", PROGRAM, json.dumps({"sys.path": sys.path, "threads": threads, **arguments})]


def main(arguments: dict[str, object]) -> None:
    """Follows the first rank until it ends. The first rank tells what goes wrong here, so nothing is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal reaches all; the first rank ends the others
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = str(arguments.pop("threads"))

    from .errors import LoadError
    from .model import Mixtral

    status = 0
    try:
        Mixtral.from_pretrained(**arguments).follow()
    except LoadError:
        status = BAD_FILE
    except MemoryError:
        status = NO_MEMORY
    except Exception:
        status = RUN_TIME
    sys.exit(status)
