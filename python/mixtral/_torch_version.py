"""Which torch the compiled libraries fit, checked in words before one of them is loaded.

The op library uses torch's stable ABI and runs on every torch from ``OLDEST`` on. The model library uses the C++ API of
``BUILT_FOR`` and runs on that one alone.
"""

from importlib.metadata import PackageNotFoundError, version

OLDEST = "2.11"  # TORCH_TARGET_VERSION in CMakeLists.txt
BUILT_FOR = "2.11"  # csrc/cmake/LibTorch.cmake refuses to build with any other


def check_ops() -> None:
    """Raise ImportError when the installed torch is too old for the op library."""
    found = _installed()
    if _major_minor(found) < _major_minor(OLDEST):
        raise ImportError(
            f"mixtral.ops: needs torch {OLDEST} or later, found torch {found}; run `pip install 'torch>={OLDEST}'`"
        )


def check_model() -> None:
    """Raise ImportError when the installed torch is not the one that the model library was built for."""
    found = _installed()
    if _major_minor(found) != _major_minor(BUILT_FOR):
        raise ImportError(
            f"mixtral: the model library was built for torch {BUILT_FOR}, found torch {found}; run "
            f"`pip install 'torch=={BUILT_FOR}.*'` (mixtral.ops, mixtral.reference and mixtral.integrations work with "
            f"torch {OLDEST} and later)"
        )


def _installed() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        raise ImportError(f"mixtral: torch is not installed; run `pip install 'torch=={BUILT_FOR}.*'`") from None


def _major_minor(text: str) -> tuple[int, int]:
    """ "2.12.0+cu130" -> (2, 12)."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
