#!/usr/bin/env bash
# Checks form and finds bugs; changes nothing. Needs scripts/setup.sh test.
#   scripts/lint.sh            clang-format and ruff on everything, clang-tidy on the folders that need no torch
#   scripts/lint.sh FILE...    clang-tidy on these C++ files instead
#   scripts/lint.sh --all      clang-tidy on every C++ file but tests: minutes
# To reformat: clang-format -i FILE..., .venv/bin/ruff format
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ruff=.venv/bin/ruff
for tool in clang-format clang-tidy "$ruff"; do
  command -v "$tool" >/dev/null || { echo "lint: $tool is missing; run scripts/setup.sh test" >&2; exit 1; }
done
status=0

# tidy FLAGS... < list of files, one a line: side by side; a file takes some seconds, one that includes torch half a minute.
tidy() {
  xargs -r -d '\n' -P "$(nproc)" -I FILE clang-tidy --quiet FILE "$@" 2> >(grep -v 'warnings\? generated\.$' >&2)
}

# With a command for each file, and without GCC's precompiled headers, which clang cannot read.
with_build() {
  local commands
  commands=$(mktemp -d)
  cmake -S . -B "$commands" -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DMIXTRAL_CUDA=OFF \
    -DMIXTRAL_UNITY_BUILD=OFF >/dev/null
  sed -i 's/-Winvalid-pch -include [^ ]*cmake_pch.hxx//' "$commands/compile_commands.json"
  tidy -p "$commands" --extra-arg=-Wno-unknown-warning-option
  local result=$?
  rm -r "$commands"
  return $result
}

git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -d '\n' clang-format --dry-run --Werror || status=1
"$ruff" check --quiet . || status=1
"$ruff" format --check --quiet . || status=1
case ${1:-} in
  "") git ls-files 'csrc/io/*.cpp' 'csrc/text/*.cpp' | tidy -- -std=c++17 -Icsrc || status=1 ;;
  --all) git ls-files 'csrc/*.cpp' | with_build || status=1 ;;
  *) printf '%s\n' "$@" | with_build || status=1 ;;
esac
((status)) && echo "lint: failed" || echo "lint: ok"
exit $status
