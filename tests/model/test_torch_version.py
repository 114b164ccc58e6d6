"""Which torch runs what: the ops any from 2.11 on, the model library 2.11 alone; each says so in words."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from mixtral import __main__, _torch_version
from record_tests import rows_of

ROOT = Path(__file__).resolve().parents[2]
PRETEND = """
import importlib.metadata, sys
sys.path.insert(0, {python!r})
version = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == "torch" else version(name)
import {module}
"""
WORDS = {
    "mixtral.ops": r"mixtral\.ops: needs torch 2\.11 or later, found torch 2\.10\.1",
    "mixtral.model": r"mixtral: the model library was built for torch 2\.11, found torch ",
}


def import_under(torch_version: str, module: str) -> subprocess.CompletedProcess:
    """Import ``module`` in a process where the metadata name another torch than the one installed."""
    code = PRETEND.format(python=str(ROOT / "python"), version=torch_version, module=module)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("torch_version", ["2.11.0", "2.12.1+cu130", "2.15.0", "3.0.0a0"])
def test_ops_accept_every_torch_from_2_11_on(torch_version, monkeypatch):
    monkeypatch.setattr(_torch_version, "version", lambda name: torch_version)
    _torch_version.check_ops()


@pytest.mark.parametrize("torch_version", ["2.10.1", "2.9.0+cpu", "1.13.1"])
def test_ops_refuse_an_older_torch(torch_version, monkeypatch):
    monkeypatch.setattr(_torch_version, "version", lambda name: torch_version)
    with pytest.raises(ImportError, match=re.escape(f"needs torch 2.11 or later, found torch {torch_version}")):
        _torch_version.check_ops()


@pytest.mark.parametrize("torch_version", ["2.10.1", "2.12.0+cu130", "2.110.0", "3.11.0"])
def test_the_model_refuses_every_other_torch(torch_version, monkeypatch):
    monkeypatch.setattr(_torch_version, "version", lambda name: torch_version)
    with pytest.raises(ImportError, match=re.escape(f"built for torch 2.11, found torch {torch_version}; run `pip")):
        _torch_version.check_model()


def test_a_missing_torch_is_named(monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_torch_version, "version", missing)
    with pytest.raises(ImportError, match="torch is not installed"):
        _torch_version.check_ops()


@pytest.mark.parametrize("module", ["mixtral", "mixtral.reference", "mixtral.ops", "mixtral.integrations.transformers"])
def test_everything_but_the_model_is_imported_on_a_later_torch(module):
    run = import_under("2.15.0", module)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", WORDS)
def test_the_check_comes_with_the_import(module):
    run = import_under("2.10.1", module)
    assert run.returncode == 1
    assert re.search("ImportError: " + WORDS[module], run.stderr)


def test_the_model_library_loads_on_the_torch_it_was_built_for_and_says_so_on_another():
    """The check that no test can pretend: scripts/check_torch_versions.sh runs it on every torch."""
    import mixtral

    if version("torch").startswith(f"{_torch_version.BUILT_FOR}."):
        assert mixtral.Mixtral.__name__ == "Mixtral"
    else:
        with pytest.raises(ImportError, match=r"built for torch 2\.11, found torch"):
            mixtral.Mixtral  # noqa: B018


def test_an_installed_binary_says_so_before_the_linker_does(monkeypatch, capsys, tmp_path):
    binary = tmp_path / "bin" / "mixtral"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setattr(__main__, "PACKAGE", tmp_path)
    monkeypatch.setattr(__main__, "BINARIES", (binary,))
    monkeypatch.setattr(_torch_version, "version", lambda name: "2.12.0")
    with pytest.raises(SystemExit) as exit:
        __main__.main()
    assert exit.value.code == 5
    assert capsys.readouterr().err.count("\n") == 1


def test_versions_are_the_same_everywhere():
    cmake = (ROOT / "csrc/cmake/LibTorch.cmake").read_text()
    pins = re.findall(r'"torch==([\d.]+)\.\*"', (ROOT / "pyproject.toml").read_text())
    pins += re.findall(r'"torch==([\d.]+)\.\*"', (ROOT / "scripts/build_backend.py").read_text())
    assert pins == [_torch_version.BUILT_FOR] * 3
    built_for = re.search(r'TORCH_VERSION MATCHES "\^(.*?)\\\\."', cmake).group(1)
    assert built_for.replace("\\\\", "") == _torch_version.BUILT_FOR
    major, minor = map(int, _torch_version.OLDEST.split("."))
    target = re.search(r"TORCH_TARGET_VERSION=0x(\w\w)(\w\w)", (ROOT / "CMakeLists.txt").read_text())
    assert (int(target.group(1), 16), int(target.group(2), 16)) == (major, minor)


def test_a_record_counts_the_cases_of_each_report(tmp_path):
    suite = '<testsuites><testsuite tests="9" skipped="2" failures="1" errors="1"/></testsuites>'
    (tmp_path / "torch-2.12-ops.xml").write_text(suite)
    reports = [tmp_path / "torch-2.12-ops.xml", tmp_path / "torch-2.13-ops.xml"]
    there, missing = rows_of(reports)
    assert (there.case, there.metric, there.value, there.bound) == ("torch-2.12-ops", "cases passed", 5, 7)
    assert there.percent_of_bound == pytest.approx(100 * 5 / 7)
    assert (missing.case, missing.value, missing.bound) == ("torch-2.13-ops", 0, None)
