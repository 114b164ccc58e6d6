"""The build backend of pyproject.toml: setuptools', which says first and in words what a build lacks."""

import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_SETUPTOOLS = 77  # reads project.license as text
TORCH = "torch==2.11.*"
TOOLS = {"cmake": "cmake>=3.25", "ninja": "ninja"}  # from pip where the system has none
STAGED = ROOT / "build" / "python"  # what setuptools collects for a wheel; setup.py says the same


def missing() -> list[str]:
    """What has to be installed before the build, as pip takes it."""
    wanted = []
    try:
        if int(version("setuptools").split(".")[0]) < OLDEST_SETUPTOOLS:
            raise PackageNotFoundError
    except PackageNotFoundError:
        wanted.append(f"setuptools>={OLDEST_SETUPTOOLS},<82")
    try:
        if version("torch").split(".")[:2] != TORCH.removesuffix(".*").partition("==")[2].split("."):
            raise PackageNotFoundError
    except PackageNotFoundError:
        wanted.append(TORCH)
    return wanted + tools()


def tools() -> list[str]:
    """The build tools that the system lacks."""
    return [requirement for name, requirement in TOOLS.items() if shutil.which(name) is None]


def backend() -> object:
    """setuptools' own backend; exits with one line where the build could not succeed."""
    if wanted := missing():
        packages = " ".join(f"'{requirement}'" for requirement in wanted)
        sys.exit(f"mixtral: --no-build-isolation needs these packages first: pip install {packages}")
    return import_module("setuptools.build_meta")


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return tools()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return tools()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    return backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict | None = None) -> str:
    return backend().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    shutil.rmtree(STAGED, ignore_errors=True)  # files of an earlier build must not get into the wheel
    return backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return backend().build_editable(wheel_directory, config_settings, metadata_directory)
