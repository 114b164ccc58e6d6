"""What is checked on a GPU, the most important first. Standard library only.

A stage's expected seconds are guesses for an H200 with 16 cores; its limit is what it gets at most.
"""

import importlib.util
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runner import Stage

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "scripts" / "gpu_check"
BUILD = ROOT / "build-gpu"
BINARY = BUILD / "bin" / "mixtral"
TARGETS = ("python_package", "mixtral_tensor_maps")
HOPPER, SIMPLE = {"MIXTRAL_CUDA_KERNELS": "hopper"}, {"MIXTRAL_CUDA_KERNELS": "simple"}

LIBRARY_CHECK = "import torch, mixtral.ops; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"
GPU_CHECK = LIBRARY_CHECK + "; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())"


@dataclass(frozen=True)
class Family:
    """Kernels that are checked, timed and given up together."""

    kernel: str  # a regular expression for its name
    tests: str  # words of pytest -k that choose what runs on it


ATTENTION, GEMM = "attention or kv_cache or sequence_starts", "grouped_gemm or moe or routing or expert or 32_bits"
FAMILIES = {
    "attention decode": Family("attention_decode_kernel", ATTENTION),
    "stream bf16": Family("grouped_gemm_stream_kernel", GEMM),
    "stream routed": Family("grouped_gemm_stream_kernel", GEMM),
    "tile": Family("grouped_gemm_tile_kernel", GEMM),
    "tile swiglu": Family("grouped_gemm_tile_kernel", GEMM),
    "prefill packed": Family("attention_prefill_hopper_kernel", ATTENTION),
    "prefill paged": Family("attention_prefill_hopper_kernel", ATTENTION),
    "fp8": Family("grouped_gemm_stream_kernel", "fp8"),
    "int4": Family("grouped_gemm_stream_kernel", "int4"),
}
# What is timed, and the families that it runs on
TIMED = {
    "moe bf16": ("stream bf16", "stream routed", "tile", "tile swiglu"),
    "moe fp8": ("fp8",),
    "moe int4": ("int4",),
    "attention decode": ("attention decode",),
    "attention prefill": ("prefill packed",),
}
NEED_NO_GPU = ("test_hopper_code.py", "test_library.py", "test_tensor_maps.py")  # although cuda is in their names


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def no_tool(name: str) -> str:
    return "" if shutil.which(name) else f"{name} is not installed"


def chosen(broken: set[str]) -> list[str]:
    """Options of pytest: tests on the GPU, without the families that were given up."""
    words = dict.fromkeys(FAMILIES[family].tests for family in FAMILIES if family in broken)
    return ["-k", " and ".join(["cuda", *(f"not ({word})" for word in words)])]


def tests(name: str, kernels: dict[str, str], cases: int, files: list[str], expected: float, limit: float) -> Stage:
    """Op tests on the GPU, on several cores where pytest-xdist is there."""

    def command(broken: set[str]) -> list[str]:
        options = chosen(broken if kernels == HOPPER else set())
        return python(HERE / "op_tests.py", name.replace(" ", "-"), *options, *files)

    return Stage(
        name,
        expected,
        limit,
        command,
        dry=python("-m", "pytest", "--collect-only", "-q", *files),
        environment=kernels | {"MIXTRAL_RANDOM_CASES": str(cases), "OMP_NUM_THREADS": "2"},  # eight run at once
    )


def test_stages() -> list[Stage]:
    first = ["tests/ops/test_random_cases.py"]
    runs = ["tests/ops/test_cuda_runs.py"]
    rest = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "ops").glob("test_*.py")
        if str(path.relative_to(ROOT)) not in first + runs and path.name not in NEED_NO_GPU
    )
    return [
        tests("random cases", HOPPER, 300, first, 40, 100),
        tests("runs and graphs", HOPPER, 300, runs, 40, 100),
        tests("op tests", HOPPER, 300, rest, 60, 120),
        tests("simple kernels", SIMPLE, 30, first + runs + rest, 60, 100),
    ]


def model_stages() -> list[Stage]:
    """Through the binary, which needs no Python of its build; through the Python package where its module fits."""

    def no_binary() -> str:
        return "" if BINARY.exists() else f"{BINARY.relative_to(ROOT)} is missing: it is built where CLI11 is installed"

    def no_module() -> str:
        fits = any((ROOT / "python" / "mixtral").glob(f"_C.{sys.implementation.cache_tag}-*.so"))
        return "" if fits else f"mixtral._C is not built for {sys.implementation.cache_tag}"

    program = python(HERE / "whole_model.py")

    def binary(broken: set[str]) -> list[str]:
        return ["env", "MIXTRAL_CUDA_KERNELS=simple", *program] if broken else program

    tests_of_package = tests("model tests", HOPPER, 1, ["tests/model/test_devices.py"], 30, 60)
    return [
        Stage("model", 15, 60, binary, [*program, "--dry-run"], missing=no_binary, environment=HOPPER),
        replace(tests_of_package, missing=no_module),
    ]


def family_stages() -> list[Stage]:
    program = HERE / "families.py"
    return [
        Stage(
            name,
            7,
            40,  # the first one may have to load what the others find in memory
            lambda _, name=name: python(program, name),
            dry=python(program, name, "--dry-run"),
            family=name,
            environment=HOPPER,
        )
        for name in FAMILIES
    ]


def timing_stages() -> list[Stage]:
    program = HERE / "timings.py"
    return [
        Stage(
            f"time {name}",
            15,
            45,
            lambda _, name=name: python(program, name),
            dry=python(program, name, "--dry-run"),
            uses=families,
            environment=HOPPER,
        )
        for name, families in TIMED.items()
    ]


def counter_stages() -> list[Stage]:
    sections = ["SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats"]
    options = ["ncu", "--clock-control", "none", "--launch-count", "1"]
    options += [word for section in sections for word in ("--section", section)]
    return [
        Stage(
            f"counters {name}",
            12,
            40,
            lambda _, name=name, family=family: [
                *options,
                "--kernel-name",
                f"regex:{family.kernel}",
                *python(HERE / "families.py", name, "--once"),
            ],
            family=name,
            group="counters",
            missing=partial(no_tool, "ncu"),
            advisory=True,
            environment=HOPPER,
        )
        for name, family in FAMILIES.items()
    ]


def sanitizer_stages() -> list[Stage]:
    """Tools that have misreported wgmma before: what they say is a hint."""
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    cases = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_random_cases.py")
    return [
        Stage(
            tool,
            60,
            150,
            lambda broken, tool=tool: [*sanitizer, "--tool", tool, *cases, *chosen(broken)],
            missing=partial(no_tool, "compute-sanitizer"),
            advisory=True,
            # No caching allocator: every access past an allocation is seen.
            environment=HOPPER | {"MIXTRAL_RANDOM_CASES": "6", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]


def build_stage(prebuilt: Path | None) -> Stage:
    """Builds, unless prebuilt libraries load here. Those bring the header of nlohmann/json too."""
    json = [f"-DMIXTRAL_JSON_INCLUDE_DIR={prebuilt / 'include'}"] if prebuilt else []
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DMIXTRAL_CUDA=ON", *json]
    configure = shlex.join(["cmake", "-S", ".", "-B", str(BUILD), *options])
    build = f"{configure} && {shlex.join(['cmake', '--build', str(BUILD), '--target', *TARGETS])}"
    loads = shlex.join(python("-c", LIBRARY_CHECK))
    script = f"{loads} || {{ {build}; }}" if prebuilt else build
    return Stage(
        "load or build" if prebuilt else "build",
        expected=20 if prebuilt else 130,
        limit=300,
        command=lambda _: ["bash", "-c", script],
        dry=python("-c", LIBRARY_CHECK),
        required=True,
    )


def first_stages() -> list[Stage]:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
    maps = str(BUILD / "bin" / "mixtral_tensor_maps")
    return [
        Stage("card", 2, 10, lambda _: ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], advisory=True),
        Stage(
            "library",
            15,
            60,
            lambda _: python("-c", GPU_CHECK),
            dry=python("-c", LIBRARY_CHECK),
            required=True,
        ),
        Stage("tensor maps", 3, 10, lambda _: [maps]),
    ]


def all_stages(prebuilt: Path | None) -> list[Stage]:
    return [
        build_stage(prebuilt),
        *first_stages(),
        *family_stages(),
        *test_stages()[:3],
        *model_stages(),
        *test_stages()[3:],
        *timing_stages(),
        *counter_stages(),
        *sanitizer_stages(),
    ]
