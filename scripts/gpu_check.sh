#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch 2.11, nvcc 13, cmake, ninja and pytest; no network, no apt.
# sentencepiece, GoogleTest and CLI11 are not needed. nlohmann/json.hpp is: MIXTRAL_JSON_INCLUDE_DIR=<folder> where it is
# not installed.
#   scripts/gpu_check.sh [folder for the record; default benchmarks/records]
# Builds, runs the op tests on CUDA against the f64 reference with opcheck, whole models CPU = CUDA, then
# compute-sanitizer memcheck on the small shapes, and writes one JSON record with the cases passed. PYTHON chooses the
# interpreter; MIXTRAL_COMMIT names the commit where the tree is a copy without git. Exit status 0 only if every step
# passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
out=${1:-benchmarks/records}
logs=build-gpu/logs
mkdir -p "$logs" "$out"

set -e
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
cmake -S . -B build-gpu -G Ninja -DPython_EXECUTABLE="$python" -DMIXTRAL_CUDA=ON \
  ${MIXTRAL_JSON_INCLUDE_DIR:+-DMIXTRAL_JSON_INCLUDE_DIR="$MIXTRAL_JSON_INCLUDE_DIR"} >"$logs/configure.log"
cmake --build build-gpu >"$logs/build.log" || { tail -n 40 "$logs/build.log"; exit 1; }
set +e

export PYTHONPATH=$PWD/python
status=0
"$python" -m pytest tests/ops -k cuda -q --junitxml="$logs/ops.xml" || status=1
"$python" -m pytest tests/model/test_devices.py -k cuda -q --junitxml="$logs/model.xml" || status=1
# One process, no caching allocator: every access past an allocation is seen.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --log-file "$logs/memcheck.log" \
  "$python" -m pytest tests/ops -k "cuda and not opcheck and not large" -q --junitxml="$logs/memcheck.xml" || status=1
grep -h "ERROR SUMMARY" "$logs/memcheck.log"

"$python" scripts/gpu_record.py "$out" "$logs"/ops.xml "$logs"/model.xml "$logs"/memcheck.xml || status=1
exit $status
