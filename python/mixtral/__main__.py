"""``mixtral`` and ``python -m mixtral``: the commands of the C++ binary, and those that Python runs."""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from ._torch_version import check_model

PACKAGE = Path(__file__).resolve().parent
# In an installed package; in a source tree.
BINARIES = (PACKAGE / "bin" / "mixtral", PACKAGE.parent.parent / "build" / "bin" / "mixtral")
# Commands that Python runs; the binary starts them too (csrc/app/python.cpp).
COMMANDS = {
    "serve": "mixtral.server.command",
    "route": "mixtral.routing.command",
    "train": "mixtral.train.command",
    "upcycle": "mixtral.train.upcycle",
    "distill": "mixtral.train.distill",
    "finetune": "mixtral.train.finetune",
}


def main() -> None:
    """Run a command of Python's, or replace this process by the binary, with the same arguments.

    Exits with 5 when the binary is not there or cannot run.
    """
    if module := COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else ""):
        if sys.argv[1] == "serve":
            restart_with_short_waits()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        sys.exit(import_module(module).main(sys.argv[2:]))
    for binary in BINARIES:
        if os.access(binary, os.X_OK):
            if binary.is_relative_to(PACKAGE):  # it uses the installed torch; in a source tree, that of the build
                exit_unless_torch_fits()
            os.environ.setdefault("MIXTRAL_PYTHON", sys.executable)  # draws the binary's figures
            os.execv(binary, [str(binary), *sys.argv[1:]])
    looked = " or ".join(str(binary) for binary in BINARIES)
    print(
        f"mixtral: the binary is not built: expected {looked}; run `scripts/setup.sh` or `pip install .`",
        file=sys.stderr,
    )
    sys.exit(5)


def restart_with_short_waits() -> None:
    """As the binary does (csrc/app/wait_policy.cpp): threads that spin take the cores from the event loop, and passes
    take a multiple of their time. OpenMP reads its variables when it is loaded, so the process starts once more."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def exit_unless_torch_fits() -> None:
    """One line and exit status 5 instead of a message of the dynamic linker."""
    try:
        check_model()
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(5)


if __name__ == "__main__":
    main()
