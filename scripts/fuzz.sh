#!/usr/bin/env bash
# Feeds the readers of untrusted files with mutated ones, under AddressSanitizer and UndefinedBehaviorSanitizer. Needs
# scripts/setup.sh test.
#   scripts/fuzz.sh                      every target of tests/fuzz on the same 2000 inputs each time
#   scripts/fuzz.sh SECONDS [TARGET...]  a campaign: each target, or those named, for that long
# A campaign keeps inputs that reach new code in build/fuzz/corpus/TARGET. What fails lies in build/fuzz/findings; to run
# it again:
#   build/fuzz/bin/fuzz_TARGET build/fuzz/findings/TARGET-...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-} targets=("${@:2}")
if ((${#targets[@]} == 0)); then
  for file in tests/fuzz/fuzz_*.cpp; do file=${file##*/fuzz_} targets+=("${file%.cpp}"); done
fi

build() {
  [[ -f build/fuzz/build.ninja ]] ||
    cmake -S . -B build/fuzz -G Ninja -DMIXTRAL_FUZZ=ON -DMIXTRAL_CUDA=OFF -DCMAKE_CXX_COMPILER=clang++ \
      -DPython_EXECUTABLE="$PWD/.venv/bin/python"
  cmake --build build/fuzz --target "${targets[@]/#/fuzz_}"
}

run() {  # TARGET
  local log=build/fuzz/$1.log
  local limits=(-rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=5 -max_len=8192 -print_final_stats=1)
  local how=(-max_total_time="$seconds") new=$PWD/build/fuzz/corpus/$1
  if [[ ! $seconds ]]; then
    how=(-seed=1 -runs=2000 -reload=0) new=$PWD/build/fuzz/same_each_time/$1
    rm -rf "$new"
  fi
  mkdir -p "$new"
  if "${fixed_addresses[@]}" "build/fuzz/bin/fuzz_$1" "${limits[@]}" "${how[@]}" \
    -artifact_prefix="$PWD/build/fuzz/findings/$1-" "$new" "$PWD/tests/fuzz/corpus/$1" >"$log" 2>&1; then
    echo "fuzz: $1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, no findings"
  else
    tail -n 60 "$log" >&2
    echo "fuzz: $1: a finding, see $log" >&2
    return 1
  fi
}

# What is tried next goes by numbers that were compared, and some are addresses. Containers may forbid to fix them.
fixed_addresses=()
! setarch -R true 2>/dev/null || fixed_addresses=(setarch -R)
mkdir -p build/fuzz/findings
build >build/fuzz/build.log 2>&1 || { cat build/fuzz/build.log >&2; exit 1; }
[[ ! -w /dev/shm ]] || export TMPDIR=/dev/shm  # each input is written to a file
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
status=0
for target in "${targets[@]}"; do run "$target" || status=1; done
exit $status
