#!/usr/bin/env bash
# Runs a compiler command and fails where ptxas says that wgmma products were serialised (C7510, C7512, C7520 and others):
# the code would be right and several times slower. ptxas has no flag that makes this an error.
output=$("$@" 2>&1)
status=$?
[[ -z $output ]] || printf '%s\n' "$output" >&2
if grep -q 'wgmma.mma_async instructions are serialized' <<<"$output"; then
  echo "wgmma products were serialised: $*" >&2
  exit 1
fi
exit $status
