"""The package as a whole: names, lazy parts, versions, stub, command."""

import ast
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mixtral
from mixtral import _C, __main__
from python_models import DEMO, ROOT


def run_python(*args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=120)


def test_ops_work_without_the_model_library(tmp_path):
    """A machine that built only libmixtral_ops.so: the model is an error in words, the ops work."""
    package = tmp_path / "mixtral"
    shutil.copytree(ROOT / "python" / "mixtral", package, ignore=shutil.ignore_patterns("_C*.so", "libmixtral.so"))
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, mixtral
assert mixtral.__file__.startswith({str(tmp_path)!r})
print(mixtral.ops.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum().item())
try:
    mixtral.Mixtral
except ImportError as error:
    print(error)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    number, message = done.stdout.splitlines()
    assert number == "4.0"
    assert "mixtral: the model library cannot be loaded" in message and "pip install" in message


def test_all_names_exist():
    for name in mixtral.__all__:
        assert getattr(mixtral, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        mixtral.nonsense  # noqa: B018


def test_stub_lists_what_the_module_has():
    def public(names):
        return {name for name in names if not name.startswith("_")}

    tree = ast.parse((ROOT / "python/mixtral/_C.pyi").read_text())

    def name_of(node):
        return node.target.id if isinstance(node, ast.AnnAssign) else node.name

    stub = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members = [
                member for member in node.body if not isinstance(member, ast.Expr)
            ]  # "..." is a class without any
            stub[node.name] = public(map(name_of, members))
        elif isinstance(node, ast.FunctionDef | ast.AnnAssign):
            stub[name_of(node)] = None
    module = {name: getattr(_C, name) for name in public(vars(_C))}
    assert stub == {name: public(vars(v)) if isinstance(v, type) else None for name, v in module.items()}


@pytest.mark.parametrize("module", ["-m mixtral", "-c 'from mixtral.__main__ import main; main()'"])
def test_command_line_is_that_of_the_binary(module):
    def run(*args: str) -> subprocess.CompletedProcess:
        return run_python(*shlex.split(module), *args)

    done = run("tokenize", str(DEMO), "-p", "Once")
    assert done.returncode == 0 and str(mixtral.Tokenizer(DEMO).encode("Once")[0]) in done.stdout
    assert run("no-such-command").returncode == 2


def test_missing_binary_is_named(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "BINARIES", (Path("/nonexistent/mixtral"),))
    with pytest.raises(SystemExit) as exit:
        __main__.main()
    assert exit.value.code == 5 and "/nonexistent/mixtral" in capsys.readouterr().err
