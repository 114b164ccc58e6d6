#!/usr/bin/env bash
# Runs tests of the engine, the server and messages between ranks with these instrumented; any report fails. Needs
# scripts/setup.sh test.
#   scripts/sanitize.sh thread [FILTER]    C++ tests with ThreadSanitizer: what threads share without a lock
#   scripts/sanitize.sh address [FILTER]   C++ tests with AddressSanitizer, leaks, UndefinedBehaviorSanitizer
#   scripts/sanitize.sh server [ARGS]      tests of the server; all of its C++ has AddressSanitizer and
#                                          UndefinedBehaviorSanitizer
#   scripts/sanitize.sh KIND --record      all of its tests, and how many passed into benchmarks/records
# FILTER is one of GoogleTest; ARGS go to pytest. Output and reports lie in build/sanitize-KIND.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:-} arguments=("${@:2}") record=
[[ ${arguments[*]} != --record ]] || record=1 arguments=()
compiler="GCC $(gcc -dumpfullversion)"
case $kind in
  thread) case_="$compiler, ThreadSanitizer: C++ tests of engine and ranks" ;;
  address) case_="$compiler, AddressSanitizer and UndefinedBehaviorSanitizer: C++ tests of engine and ranks" ;;
  server) case_="$compiler, AddressSanitizer and UndefinedBehaviorSanitizer: tests of the server" ;;
  *) echo "sanitize: thread, address or server, not '$kind'" >&2; exit 2 ;;
esac
log=$PWD/build/sanitize-$kind.log xml="$PWD/build/$case_.xml"
rm -f "$xml" "$log".*
export TSAN_OPTIONS=second_deadlock_stack=1:suppressions=tests/cpp/races.supp UBSAN_OPTIONS=print_stacktrace=1 LSAN_OPTIONS=suppressions=tests/cpp/leaks.supp

if [[ $kind == server ]]; then
  # Python is not instrumented: the runtimes are loaded before it, and leaks, of which it has many, are left out. Its
  # files are copied beside the instrumented libraries.
  package=$PWD/build/sanitize/python
  [[ -f build/sanitize/build.ninja ]] ||
    cmake -S . -B build/sanitize -G Ninja -DMIXTRAL_SANITIZE=ON -DMIXTRAL_CUDA=OFF \
      -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package/mixtral"
  cmake --build build/sanitize --target _C
  tar -C python --exclude='*.so' -c mixtral | tar -C "$package" -x
  runtimes=$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so):$(gcc -print-file-name=libstdc++.so)
  options=log_path=$log:detect_leaks=0
  run=(env LD_PRELOAD="$runtimes" ASAN_OPTIONS="$options" UBSAN_OPTIONS="$options:print_stacktrace=1"
    PYTHONPATH="$package" .venv/bin/python -m pytest -p no:cacheprovider --junitxml="$xml"
    -o pythonpath="$package benchmarks scripts tests/model tests/server")
  # Not those that start a browser, nginx or lm-evaluation-harness, nor those of the command, which need the binary and
  # the bundled model.
  ((${#arguments[@]})) ||
    arguments=(tests/server --ignore-glob='*page.py' --ignore-glob='*nginx.py' --ignore-glob='*lm_eval*'
      --ignore-glob='*serve_command.py')
  run+=("${arguments[@]}")
else
  cmake --build build --target "mixtral_tests_$kind"
  # ThreadSanitizer does not see how OpenMP's threads wait for each other: one thread, and no test that asks for more.
  export OMP_NUM_THREADS=1
  filter=${arguments[0]:-*}
  if [[ $kind == thread ]]; then
    [[ $filter == *-* ]] || filter+=-
    filter+=:EngineRequests.TheCallersThreadCountHoldsInTheEngine:EngineRequests.IdleWorkersDoNotOutlastTheirWork
  fi
  # It wants the program at addresses that it knows. Containers may forbid to fix them.
  run=(setarch -R)
  setarch -R true 2>/dev/null || run=()
  run+=("build/bin/mixtral_tests_$kind" --gtest_filter="$filter" --gtest_output="xml:$xml")
fi

status=0
"${run[@]}" >"$log" 2>&1 || status=$?
cat "$log".* >>"$log" 2>/dev/null || true  # a server's own, by process
reports=$(grep -cE '^WARNING: ThreadSanitizer|ERROR: (Address|Leak)Sanitizer|: runtime error:' "$log" || true)
((status != 0 || reports == 0)) || status=1
if ((status != 0)); then
  grep -v '^\[' "$log" | tail -n 300 >&2 || true
fi
tests=$(sed -nE 's/^\[={10}\] ([0-9]+ tests).* ran\..*/\1/p; s/^=+ (.*[0-9] (passed|failed|error).*) =+$/\1/p' "$log")
echo "sanitize: $kind: ${tests:-ended early}, $reports reports, see ${log#"$PWD/"}"
if [[ $record && $status == 0 ]]; then
  .venv/bin/python scripts/record_tests.py sanitizers cpu benchmarks/records "$xml"
fi
exit $status
