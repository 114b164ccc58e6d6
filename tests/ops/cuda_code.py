"""The tool that reads the machine code in the op library."""

import importlib.util
import shutil
from pathlib import Path


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with torch's triton."""
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)
