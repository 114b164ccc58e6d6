#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch 2.11, nvcc 13, cmake, ninja and pytest; no network, no apt.
# GoogleTest and CLI11 are not needed. nlohmann/json.hpp is: MIXTRAL_JSON_INCLUDE_DIR=<folder> where it is
# not installed.
#   scripts/gpu_check.sh tests [folder for the records; default benchmarks/records]        builds, then tests
#   scripts/gpu_check.sh sanitizers [folder]                                               builds, then compute-sanitizer
#   scripts/gpu_check.sh benchmarks                                                        builds, then measures
# Each takes less than ten minutes on 16 cores. `tests` runs the op tests on CUDA against the f64 reference, with opcheck and
# 5000 random cases an op, equal bits over 1000 runs, graphs whose routing changes, sizes beyond 2^32, and whole models
# CPU = CUDA; `sanitizers` runs memcheck, racecheck, initcheck and synccheck on small shapes. Both do it for the simple
# kernels and for those of the GPU at hand (MIXTRAL_CUDA_KERNELS), and end in a table and a record of the cases passed.
# `benchmarks` measures those of the GPU at hand. MIXTRAL_CUDA_KERNELS, when set, is the only kind in all three.
# PYTHON chooses the interpreter; MIXTRAL_COMMIT names the commit where the tree is a copy without git. Exit status 0
# only if every step passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
what=${1:?"say what to run: tests, sanitizers or benchmarks"}
out=${2:-benchmarks/records}
logs=build-gpu/logs/$what
rm -rf "$logs"
mkdir -p "$logs" "$out"
export PYTHONPATH=$PWD/python

build() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
  cmake -S . -B build-gpu -G Ninja -DPython_EXECUTABLE="$python" -DMIXTRAL_CUDA=ON \
    ${MIXTRAL_JSON_INCLUDE_DIR:+-DMIXTRAL_JSON_INCLUDE_DIR="$MIXTRAL_JSON_INCLUDE_DIR"} >"$logs/configure.log" &&
    cmake --build build-gpu >"$logs/build.log" || { tail -n 40 "$logs"/*.log; exit 1; }
}

kernel_choices() {
  local capability
  if [[ -n ${MIXTRAL_CUDA_KERNELS:-} ]]; then echo "$MIXTRAL_CUDA_KERNELS"; return; fi
  capability=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability())')
  if [[ $capability == "9 0" ]]; then echo simple hopper; else echo simple; fi
}

run_tests() {
  local kernels
  for kernels in $(kernel_choices); do
    MIXTRAL_CUDA_KERNELS=$kernels MIXTRAL_RANDOM_CASES=5000 \
      "$python" -m pytest tests/ops -k cuda -q --junitxml="$logs/$kernels-ops.xml" || status=1
    MIXTRAL_CUDA_KERNELS=$kernels \
      "$python" -m pytest tests/model/test_devices.py -k cuda -q --junitxml="$logs/$kernels-model.xml" || status=1
  done
  "$python" scripts/record_tests.py cuda-correctness cuda "$out" "$logs"/*.xml || status=1
}

run_sanitizers() {
  local kernels tool
  for kernels in $(kernel_choices); do
    for tool in memcheck racecheck initcheck synccheck; do
      # No caching allocator: every access past an allocation is seen.
      MIXTRAL_CUDA_KERNELS=$kernels MIXTRAL_RANDOM_CASES=12 MIXTRAL_GRADIENT_CASES=4 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$logs/$kernels-$tool.log" \
        "$python" -m pytest tests/ops/test_random_cases.py tests/ops/test_*_backward.py -k "cuda and random_cases" -q \
        --junitxml="$logs/$kernels-$tool.xml" || status=1
      grep -h "ERROR SUMMARY" "$logs/$kernels-$tool.log"
    done
  done
  "$python" scripts/record_tests.py cuda-sanitizers cuda "$out" "$logs"/*.xml || status=1
}

run_benchmarks() {
  local kernels
  kernels=$(kernel_choices)
  MIXTRAL_CUDA_KERNELS=${kernels##* } "$python" benchmarks/run_all.py --device cuda --minutes 8 || status=1
}

status=0
build
case $what in
  tests) run_tests ;;
  sanitizers) run_sanitizers ;;
  benchmarks) run_benchmarks ;;
  *) echo "gpu_check: tests, sanitizers or benchmarks, not $what" >&2; exit 2 ;;
esac
exit $status
