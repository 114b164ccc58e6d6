"""The instruction sets of the CPU kernels, each in a process of its own: MIXTRAL_CPU_ISA is read once."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]


def run_under_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    """Python ``code`` on the CPU alone under ``MIXTRAL_CPU_ISA=isa``: its exit status and outputs."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("python", "tests", "tests/ops"))
    variables = {"MIXTRAL_CPU_ISA": isa, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True
    )


@functools.cache
def available_isas() -> list[str]:
    """Those that this processor has; asking for a higher one is an error that names the highest."""
    result = run_under_isa(ISAS[-1], "import torch, mixtral.ops; mixtral.ops.swiglu(torch.ones(1, 2))")
    refusal = re.search(r"must be one that this processor has, up to (\w+), got", result.stderr)
    assert refusal or result.returncode == 0, result.stderr
    return ISAS[: ISAS.index(refusal.group(1)) + 1] if refusal else ISAS
