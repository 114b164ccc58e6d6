"""The one torch version that the compiled libraries fit, checked before any of them is loaded."""

from importlib.metadata import version

BUILT_FOR = "2.11"  # csrc/cmake/LibTorch.cmake refuses to build with any other


def check_torch_version() -> None:
    """Raise ImportError, in words, when the installed torch is not the one that mixtral was built for."""
    found = version("torch")
    if ".".join(found.split(".")[:2]) != BUILT_FOR:
        raise ImportError(
            f"mixtral: built for torch {BUILT_FOR}, found torch {found}; reinstall with "
            f"`pip install torch=={BUILT_FOR}.*`, then `pip install --no-build-isolation --no-deps .`"
        )
