"""Bounds: no operation is faster than its least traffic and its useful arithmetic allow."""

import ctypes
import functools
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import mixtral.ops as ops


@dataclass(frozen=True)
class Rates:
    """What a device can do."""

    bandwidth: float  # GB/s
    arithmetic: float  # GFLOP/s


# Data sheets, by a part of the GPU's name: GB/s, and GFLOP/s by bytes of an element (dense; f32 without tensor cores).
HOPPER_ARITHMETIC = {1: 1978.9e3, 2: 989.4e3, 4: 66.9e3}
GPUS = {"H100 80GB HBM3": (3350.0, HOPPER_ARITHMETIC), "H200": (4800.0, HOPPER_ARITHMETIC)}


@dataclass(frozen=True)
class Bound:
    """The tighter of the two limits. ``work / seconds`` and ``rate`` are in ``unit``."""

    work: float
    unit: str
    rate: float

    @property
    def seconds(self) -> float:
        return self.work / self.rate


def bound_of(gigabytes: float, gflop: float, rates: Rates, device: str) -> Bound:
    """The roofline: memory or arithmetic, whichever takes longer."""
    thousands, prefix = (1e3, "T") if device == "cuda" else (1.0, "G")
    if gigabytes / rates.bandwidth >= gflop / rates.arithmetic:
        return Bound(gigabytes / thousands, f"{prefix}B/s", rates.bandwidth / thousands)
    return Bound(gflop / thousands, f"{prefix}FLOP/s", rates.arithmetic / thousands)


def data_sheet_rates(gpu: str, element_size: int) -> Rates | None:
    """By the name of a GPU; None for one that the table does not have."""
    for name, (bandwidth, arithmetic) in GPUS.items():
        if name in gpu:
            return Rates(bandwidth, arithmetic[element_size])
    return None


def hopper_peak(multiprocessors: int, megahertz: float) -> float:
    """TFLOP/s of dense bf16 at a clock: what is left of the data sheet's rate where power holds the clock down."""
    return 4096 * multiprocessors * megahertz * 1e6 / 1e12


@functools.cache
def rates_of(device: str, dtype: torch.dtype) -> Rates:
    """From the data sheet where there is one, else measured, once in a process."""
    sheet = data_sheet_rates(torch.cuda.get_device_name(), dtype.itemsize) if device == "cuda" else None
    return sheet or Rates(_read_bandwidth(device), measure_matmul_rate(device, dtype))


def _seconds(function: Callable, device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@functools.cache
def _read_bandwidth(device: str) -> float:
    return measure_read_bandwidth(device)


def measure_read_bandwidth(device: str) -> float:
    """Memory read rate in GB/s, of a buffer far larger than the caches: the faster of its sum and of the dot product of
    its halves, which keeps more reads in flight; medians."""
    buffer = torch.ones(256 * 2**20, dtype=torch.float32, device=device)
    left, right = buffer.chunk(2)

    def median(function: Callable) -> float:
        _seconds(function, device)
        return statistics.median(_seconds(function, device) for _ in range(5))

    return buffer.nbytes / min(median(buffer.sum), median(lambda: left.dot(right))) / 1e9


def measure_matmul_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest matmul seen, torch's or ours; on the CPU its operands stay in the L2 caches."""
    rows, columns, depth = (512, 512, 1024) if device == "cpu" else (8192, 8192, 8192)
    a = torch.randn(rows, depth, device=device).to(dtype)
    b = torch.randn(columns, depth, device=device).to(dtype)
    candidates = [lambda: a @ b.T]
    if device == "cpu":
        packed, offs = ops.pack_weight(b[None]), torch.tensor([rows], dtype=torch.int32)
        candidates.append(lambda: ops.grouped_gemm(a, packed, offs))
    fastest = min(_seconds(function, device) for function in candidates for _ in range(30))
    return 2 * rows * columns * depth / fastest / 1e9


@functools.cache
def _fma_library(isa: str) -> ctypes.CDLL:
    level = {"baseline": "x86-64", "avx2": "x86-64-v3"}.get(isa, "x86-64-v4")
    with tempfile.TemporaryDirectory() as folder:
        path, source = Path(folder) / "fma_peak.so", Path(__file__).parent / "fma_peak.c"
        subprocess.run(["cc", "-O3", f"-march={level}", "-shared", "-fPIC", "-o", path, source], check=True)
        library = ctypes.CDLL(str(path))
    library.multiply_add.argtypes = [ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)]
    library.multiply_add.restype = ctypes.c_double
    return library


def measure_fma_peak(threads: int, isa: str) -> float:
    """GFLOP/s of f32 multiply-adds in the registers of an instruction set, a name of MIXTRAL_CPU_ISA: no product of f32
    or f16 is faster, nor one of bf16 whose instruction set has none for bf16. The best of five."""
    library, operations = _fma_library(isa), []

    def work() -> None:  # ctypes lets threads run together
        operations.append(library.multiply_add(4_000_000, ctypes.byref(ctypes.c_float())))

    def run() -> None:
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    fastest = min(_seconds(run, "cpu") for _ in range(5))
    return threads * operations[0] / fastest / 1e9
