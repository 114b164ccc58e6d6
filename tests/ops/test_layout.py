"""An op exists if and only if its folder, schema, wrapper, reference, test and benchmark exist."""

import re
from pathlib import Path

import pytest

import mixtral.ops as ops
from mixtral import reference

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops/registration.cpp").read_text())
# Inverse pairs, and an op that only adds a step before another, share a folder.
FOLDER = {
    "add_rms_norm": "rms_norm",
    "moe_unpermute": "moe_permute",
    "unpack_weight": "pack_weight",
    "rolling_kv_cache_write": "rolling_kv_cache",
    "rolling_kv_cache_rope_write": "rolling_kv_cache",
    "rolling_kv_cache_attention": "rolling_kv_cache",
}
# moe_mlp chains the kernels of the other ops.
KERNELS = {"moe_mlp": ()}


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_schema_has_all_its_parts(op):
    folder = FOLDER.get(op, op)
    kernels = KERNELS.get(folder, ("_cpu.cpp", "_cuda.cu"))
    parts = [f"csrc/ops/{folder}/{folder}{suffix}" for suffix in (".h", ".cpp", *kernels)]
    parts += [f"python/mixtral/ops/{folder}.py", f"tests/ops/test_{folder}.py", f"benchmarks/bench_{folder}.py"]
    missing = [part for part in parts if not (ROOT / part).exists()]
    assert not missing
    assert op in ops.__all__ and getattr(ops, op).__doc__
    assert getattr(reference, op).__doc__


def test_nothing_exists_without_a_schema():
    folders = {FOLDER.get(op, op) for op in SCHEMAS}
    assert {path.name for path in (ROOT / "csrc/ops").iterdir() if path.is_dir()} == folders | {"cpu", "cuda"}
    assert set(ops.__all__) == set(SCHEMAS)
    assert len(SCHEMAS) == 16
