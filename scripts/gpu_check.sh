#!/usr/bin/env bash
# Everything that needs a GPU, within a number of minutes; no network. The most important comes first, each stage is a
# process of its own with a time limit, and its result is kept at once.
#   scripts/gpu_check.sh --minutes 9 --prebuilt DIR     with libraries that scripts/gpu_prebuild.sh DIR made elsewhere
#   scripts/gpu_check.sh --minutes 12                   builds here first: torch 2.11, nvcc 13, cmake, ninja, json.hpp
#   scripts/gpu_check.sh --minutes 8 --dry-run          every stage up to its first launch; needs no GPU
# scripts/gpu_check/stages.py lists the stages. The results are in --out, by default build-gpu/check: summary.json, log.txt,
# the records, and gpu_check.tar with all of them. PYTHON chooses the interpreter, else .venv's; MIXTRAL_COMMIT
# names the commit where the tree is a copy without git. Exit status 0 only if no stage failed that ran; what was left out is named.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
exec "${PYTHON:-python3}" "$root/scripts/gpu_check" "$@"
