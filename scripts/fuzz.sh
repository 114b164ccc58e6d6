#!/usr/bin/env bash
# Feeds the readers of untrusted files with mutated ones, under AddressSanitizer and UndefinedBehaviorSanitizer.
#   scripts/fuzz.sh                    every target of tests/fuzz on a fixed number of inputs, the same each time
#   scripts/fuzz.sh SECONDS [TARGET]…  a campaign: each target, or those named, for that long
# A campaign keeps new inputs in build/fuzz/corpus/TARGET. What fails lies in build/fuzz/findings; run it again with
#   build/fuzz/bin/fuzz_TARGET build/fuzz/findings/TARGET-…
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-} limits=(-rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=5 -max_len=4096 -print_final_stats=1)
targets=("${@:2}")
[[ ${targets[*]} ]] || for file in tests/fuzz/fuzz_*.cpp; do file=${file##*/fuzz_} targets+=("${file%.cpp}"); done

if [[ ! -f build/fuzz/build.ninja ]]; then
  cmake -S . -B build/fuzz -G Ninja -DMIXTRAL_FUZZ=ON -DMIXTRAL_CUDA=OFF -DCMAKE_CXX_COMPILER=clang++ \
    -DPython_EXECUTABLE="$PWD/.venv/bin/python" >build/fuzz.log || { cat build/fuzz.log >&2; exit 1; }
fi
cmake --build build/fuzz --target "${targets[@]/#/fuzz_}"
mkdir -p build/fuzz/findings
[[ ! -w /dev/shm ]] || export TMPDIR=/dev/shm  # each input is written to a file

run() {
  local target=$1 log=build/fuzz/$1.log new=build/fuzz/corpus/$1 how=(-seed=1 -runs=5000)
  [[ $seconds ]] && how=(-max_total_time="$seconds")
  [[ $seconds ]] && mkdir -p "$new" && how+=("$new")
  if ! "build/fuzz/bin/fuzz_$target" "${limits[@]}" "${how[@]}" "tests/fuzz/corpus/$target" \
    -artifact_prefix="build/fuzz/findings/$target-" >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    return 1
  fi
  echo "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, no findings"
}

status=0
for target in "${targets[@]}"; do run "$target" || status=1; done
exit $status
