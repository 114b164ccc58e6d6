"""An op exists if and only if its folder, schema, wrapper, reference, test and benchmark exist; where files belong."""

import re
from pathlib import Path

import pytest

import mixtral.ops as ops
from mixtral import reference

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops/registration.cpp").read_text())
BACKWARD = re.compile(r"(_for)?_backward")
OPS = [schema for schema in SCHEMAS if not BACKWARD.search(schema)]
# Nothing trains through a cache or a packed weight.
WITHOUT_GRADIENT = {op for op in OPS if op.startswith("rolling_kv_cache") or "pack_weight" in op}
# Inverse pairs share a folder, and an op that only does something more before another one is in the folder of that.
FOLDER = {
    "add_rms_norm": "rms_norm",
    "moe_unpermute": "moe_permute",
    "router_logits": "moe_route",
    "unpack_weight": "pack_weight",
    "rolling_kv_cache_write": "rolling_kv_cache",
    "rolling_kv_cache_rope_write": "rolling_kv_cache",
    "rolling_kv_cache_attention": "rolling_kv_cache",
}
# moe_mlp chains the kernels of the other ops.
KERNELS = {"moe_mlp": ()}


def folder_of(name: str) -> str:
    """Of an op, or of a schema or file ``<op>_backward*`` or ``<op>_for_backward*``, which belongs to the op."""
    return FOLDER.get(op_of(name), op_of(name))


def op_of(name: str) -> str:
    return BACKWARD.split(name)[0]


def files(pattern: str) -> list[Path]:
    return sorted((ROOT / "csrc/ops").rglob(pattern))


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_all_its_parts(op):
    folder = folder_of(op)
    kernels = KERNELS.get(folder, ("_cpu.cpp", "_cuda.cu"))
    parts = [f"csrc/ops/{folder}/{folder}{suffix}" for suffix in (".h", ".cpp", *kernels)]
    parts += [f"python/mixtral/ops/{folder}.py", f"tests/ops/test_{folder}.py", f"benchmarks/bench_{folder}.py"]
    missing = [part for part in parts if not (ROOT / part).exists()]
    assert not missing
    assert op in ops.__all__ and getattr(ops, op).__doc__
    assert getattr(reference, op).__doc__


def test_nothing_exists_without_a_schema():
    folders = {folder_of(schema) for schema in SCHEMAS}
    assert {path.name for path in (ROOT / "csrc/ops").iterdir() if path.is_dir()} == folders | {"cpu", "cuda"}
    assert set(ops.__all__) == set(OPS)
    assert len(OPS) == 18


def test_backward_belongs_to_its_op():
    assert folder_of("rms_norm_backward") == "rms_norm"
    assert folder_of("moe_unpermute_backward_weights") == "moe_permute"
    assert folder_of("moe_mlp_for_backward") == "moe_mlp"
    assert {op_of(schema) for schema in SCHEMAS} == set(OPS)
    for path in files("*_backward*"):
        assert path.relative_to(ROOT / "csrc/ops").parts[0] == folder_of(path.name), path


def test_every_op_has_a_gradient_or_none_by_decision():
    backward = {schema for schema in SCHEMAS if BACKWARD.search(schema)}
    assert set(OPS) - {op_of(schema) for schema in backward} == WITHOUT_GRADIENT
    for schema in backward:
        assert "_for_backward" in schema or getattr(reference, schema).__doc__
        assert schema not in ops.__all__, "the way to a gradient is autograd"


def test_what_needs_hopper_is_in_a_folder_of_its_own():
    """Only these files may use what kernel_hopper.cuh brings: TMA, wgmma and the like do not compile for other GPUs."""
    own = [path for path in files("*.*") if path.parent.name == "hopper"]
    assert own and all("_hopper" in path.name for path in own)
    shared = [path for path in files("*.*") if path.parent.name != "hopper" and path.parent.name != "cuda"]
    assert not [path for path in shared if "hopper" in path.name or "kernel_hopper.cuh" in path.read_text()]
