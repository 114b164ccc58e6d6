#!/usr/bin/env bash
# Runs the C++ tests of the engine, the server's bridge and messages between ranks with these instrumented; any report
# fails. Needs scripts/setup.sh test.
#   scripts/sanitize.sh thread [FILTER]    ThreadSanitizer: what threads share without a lock
#   scripts/sanitize.sh address [FILTER]   AddressSanitizer with leaks, UndefinedBehaviorSanitizer
# FILTER is one of GoogleTest. The reports lie in build/sanitize-thread.log and build/sanitize-address.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:-} filter=${2:-*}
[[ $kind == thread || $kind == address ]] || { echo "sanitize: thread or address, not '$kind'" >&2; exit 2; }
cmake --build build --target "mixtral_tests_$kind"

# ThreadSanitizer does not see how OpenMP's threads wait for each other: one thread, and no test that asks for more.
export OMP_NUM_THREADS=1
if [[ $kind == thread ]]; then
  [[ $filter == *-* ]] || filter+=-
  filter+=:EngineRequests.TheCallersThreadCountHoldsInTheEngine:EngineRequests.IdleWorkersDoNotOutlastTheirWork
fi
# It wants the program at addresses that it knows. Containers may forbid to fix them.
fixed_addresses=()
! setarch -R true 2>/dev/null || fixed_addresses=(setarch -R)
export TSAN_OPTIONS=second_deadlock_stack=1 UBSAN_OPTIONS=print_stacktrace=1 LSAN_OPTIONS=suppressions=tests/cpp/leaks.supp
log=build/sanitize-$kind.log status=0
"${fixed_addresses[@]}" "build/bin/mixtral_tests_$kind" --gtest_filter="$filter" >"$log" 2>&1 || status=$?
if ((status != 0)); then
  grep -v '^\[' "$log" | head -n 200 >&2 || true
fi
tests=$(sed -n 's/^\[==========\] \([0-9]* tests\).* ran\..*/\1/p' "$log")
reports=$(grep -cE '^WARNING: ThreadSanitizer|ERROR: (Address|Leak)Sanitizer|: runtime error:' "$log" || true)
echo "sanitize: $kind: ${tests:-ended early}, $reports reports, see $log"
exit $status
