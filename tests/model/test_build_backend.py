"""What a build lacks is said before it starts."""

import re
from importlib.metadata import PackageNotFoundError

import pytest

import build_backend


def installed(monkeypatch, tools: tuple[str, ...], **versions: str) -> None:
    """Let these packages and system tools be all there is."""

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(build_backend, "version", version)
    monkeypatch.setattr(build_backend.shutil, "which", lambda name: f"/usr/bin/{name}" if name in tools else None)


@pytest.mark.parametrize(
    ("tools", "versions", "missing"),
    [
        (("cmake", "ninja"), {"setuptools": "81.0.0", "torch": "2.11.0+cu130"}, []),
        (("cmake", "ninja"), {"setuptools": "65.5.0", "torch": "2.11.0"}, ["setuptools>=77,<82"]),
        (("cmake", "ninja"), {"torch": "2.12.0"}, ["setuptools>=77,<82", "torch==2.11.*"]),
        (("ninja",), {"setuptools": "77.0.3"}, ["torch==2.11.*", "cmake>=3.25"]),
    ],
)
def test_missing_packages_are_named(monkeypatch, tools, versions, missing):
    installed(monkeypatch, tools, **versions)
    assert build_backend.missing() == missing
    if missing:
        command = "pip install " + " ".join(f"'{requirement}'" for requirement in missing)
        with pytest.raises(SystemExit, match=f"^mixtral: .*{re.escape(command)}$"):
            build_backend.backend()


def test_an_isolated_build_brings_the_tools_that_the_system_lacks(monkeypatch):
    installed(monkeypatch, ("ninja",))
    assert build_backend.get_requires_for_build_wheel() == ["cmake>=3.25"]


def test_files_of_an_earlier_build_do_not_get_into_the_wheel(monkeypatch, tmp_path):
    old = tmp_path / "lib" / "mixtral" / "gone.py"
    old.parent.mkdir(parents=True)
    old.touch()

    class Setuptools:
        @staticmethod
        def build_wheel(*args):
            return str(old.exists())

    monkeypatch.setattr(build_backend, "STAGED", tmp_path)
    monkeypatch.setattr(build_backend, "backend", lambda: Setuptools)
    assert build_backend.build_wheel("dist") == "False"
