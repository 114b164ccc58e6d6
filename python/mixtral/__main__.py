"""``mixtral`` and ``python -m mixtral``: the commands of the C++ binary."""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# In an installed package; in a source tree.
BINARIES = (PACKAGE / "bin" / "mixtral", PACKAGE.parent.parent / "build" / "bin" / "mixtral")


def main() -> None:
    """Replace this process by the binary, with the same arguments. Exits with 5 when the binary is not there."""
    for binary in BINARIES:
        if os.access(binary, os.X_OK):
            os.execv(binary, [str(binary), *sys.argv[1:]])
    looked = " or ".join(str(binary) for binary in BINARIES)
    print(
        f"mixtral: the binary is not built: expected {looked}; run `pip install --no-build-isolation .`",
        file=sys.stderr,
    )
    sys.exit(5)


if __name__ == "__main__":
    main()
