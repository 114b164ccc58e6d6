"""The programs of scripts/gpu_check, on the CPU and with fake tools."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import common
import families
import op_tests
import runner
import stages
import timings
import whole_model
from record_tests import rows_of
from roofline import Rates

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ["stream routed", "fp8", "int4", "prefill paged"])
def test_a_family_with_wrong_numbers_is_called_wrong(family, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["families.py", family, "--dry-run"])
    assert families.main() == 0
    for op in ("moe_mlp", "grouped_gemm", "rolling_kv_cache_attention"):
        right = getattr(families.ops, op)

        def wrong(*arguments, right=right) -> torch.Tensor:
            out = right(*arguments)
            out[0] = 0
            return out

        monkeypatch.setattr(families.ops, op, wrong)
    assert families.main() == runner.WRONG


def test_tests_run_without_the_plugins_that_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(op_tests, "has_module", lambda name: name != "xdist")
    assert op_tests.options() == op_tests.TIMEOUT
    assert capsys.readouterr().out == "pytest-xdist is not installed: without -n 8 --dist worksteal\n"


@pytest.mark.parametrize("name", stages.TIMED)
def test_every_timing_leaves_its_rows(name, monkeypatch):
    """On the CPU, at small sizes."""
    monkeypatch.setattr(common, "rates_of", lambda device, dtype: Rates(bandwidth=10.0, arithmetic=100.0))
    turns = common.take_turns
    monkeypatch.setattr(common, "take_turns", lambda functions, device, budget: turns(functions, device, 0.0))
    experts = timings.moe.make_experts
    monkeypatch.setattr(timings.moe, "make_experts", lambda device: experts(device, 64, 96))
    monkeypatch.setattr(timings, "TOKENS", (1, 5))
    monkeypatch.setattr(timings, "KEYS", (64, 130))
    written = []
    monkeypatch.setattr(common.Bench, "write", lambda bench: written.append(len(bench.rows)))
    bench = common.Bench("test", "cpu")
    timings.CASES[name](bench)
    assert written == [1, 2] and all(row.value > 0 and row.peer for row in bench.rows)


@pytest.mark.parametrize(("body", "code", "passed"), [("pass", 0, 2), ("assert seed != 1", 1, 1)])
def test_tests_leave_a_row_and_their_exit_status(body, code, passed, tmp_path, monkeypatch):
    recorded = []
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n@pytest.mark.parametrize('seed', [1, 2])\ndef test_it(seed):\n    {body}\n"
    )
    monkeypatch.setattr(op_tests, "ROOT", tmp_path)
    monkeypatch.setattr(op_tests, "has_module", lambda name: False)
    monkeypatch.setattr(op_tests, "record", lambda name, device, out, reports: recorded.extend(reports))
    monkeypatch.setenv("MIXTRAL_CUDA_KERNELS", "hopper")
    assert op_tests.main("one", ["test_one.py"]) == code
    assert [report.name for report in recorded] == ["hopper-one.xml"]
    (row,) = rows_of(recorded)
    assert (row.case, row.value, row.bound) == ("hopper-one", passed, 2)


@pytest.mark.parametrize("other", [{}, {"tokens": [1, 2, 4]}, {"loss": 5.02}])
def test_a_model_that_differs_on_cuda_is_called_wrong(other, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["whole_model.py"])

    def run(*arguments: object) -> dict:
        here = {"tokens": [1, 2, 3], "loss": 5.0} | (other if "cuda" in arguments else {})
        return {"token_ids": here["tokens"], "nats_per_token": here["loss"]}

    monkeypatch.setattr(whole_model, "run", run)
    assert whole_model.main() == (runner.WRONG if other else 0)


def test_prebuilding_takes_what_is_committed_along(tmp_path):
    """With tools that only say what they would do."""
    tools, tree, result = (tmp_path / name for name in ("tools", "tree", "result"))
    for folder in (tools, tree / "scripts", tree / "json" / "nlohmann"):
        folder.mkdir(parents=True)
    (tree / "json" / "nlohmann" / "json.hpp").write_text("// json\n")
    built = ["python/mixtral/libmixtral_ops.so", "python/mixtral/libmixtral.so", "build-gpu/bin/mixtral_tensor_maps"]
    module = f"python/mixtral/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    cmake = ["mkdir -p python/mixtral build-gpu/bin", *(f"echo built > {file}" for file in [*built, module])]
    cmake += [f"echo NLOHMANN_JSON_INCLUDE_DIR:PATH={tree}/json > build-gpu/CMakeCache.txt"]
    fakes = {"cmake": cmake, "strip": [], "readelf": ["echo Name: GLIBC_2.9 Name: GLIBC_2.34 Name: GLIBCXX_3.4.30"]}
    for name, lines in fakes.items():
        (tools / name).write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        (tools / name).chmod(0o755)
    script = tree / "scripts" / "gpu_prebuild.sh"
    script.write_text((ROOT / "scripts" / "gpu_prebuild.sh").read_text())
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tree, capture_output=True, text=True, check=True
        ).stdout

    def prebuild() -> subprocess.CompletedProcess:
        return subprocess.run(["bash", script, result], capture_output=True, text=True, env=environment)

    git("init", "-q")
    git("add", "scripts")
    git("commit", "-qm", "One")
    done = prebuild()
    assert done.returncode == 0, done.stderr
    assert (result / "commit").read_text() == git("rev-parse", "HEAD")
    files = {str(path.relative_to(result)) for path in result.rglob("*") if path.is_file()}
    libraries = {f"python/{Path(file).name}" for file in [*built[:2], module]}
    assert files == libraries | {"bin/mixtral_tensor_maps", "include/nlohmann/json.hpp", "commit"}
    assert "needs at least GLIBC_2.34, GLIBCXX_3.4.30" in done.stdout
    script.write_text(script.read_text() + "# changed\n")
    done = prebuild()
    assert done.returncode == 1 and "commit the changes first: records name the commit" in done.stderr
