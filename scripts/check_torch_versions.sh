#!/usr/bin/env bash
# Runs the built op library, unchanged, on later versions of torch and transformers, each in a throw-away environment:
#   scripts/check_torch_versions.sh [folder for the record; default benchmarks/records]
# Build first (scripts/setup.sh test). For each torch: the op tests named below and the check of the model library; with it
# each transformers: the plug-in. One environment at a time, up to 8 GB of disk; about five minutes each. Ends in a table and
# a record of the cases passed; a version that cannot be installed is a row without cases.
# TORCH_VERSIONS="2.11 2.12", TRANSFORMERS_VERSIONS="5.17 5.18" and PYTHON=<interpreter> choose others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra torch_versions <<<"${TORCH_VERSIONS:-2.15 2.14 2.13 2.12 2.11}"
read -ra transformers_versions <<<"${TRANSFORMERS_VERSIONS:-5.24 5.23 5.22 5.21 5.20 5.19 5.18 5.17}"
op_tests=(tests/ops/test_library.py tests/ops/test_moe_mlp.py tests/ops/test_topk_softmax.py tests/ops/test_moe_permute.py
  tests/ops/test_rms_norm.py tests/ops/test_rope.py tests/ops/test_sliding_window_attention.py tests/model/test_torch_version.py)
out=${1:-benchmarks/records}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
reports=()
export PYTHONPATH=$PWD/python HF_HUB_OFFLINE=1

# The full version of an installed package.
version_of() { "$work/venv/bin/python" -c "from importlib.metadata import version; print(version('$1').split('+')[0])"; }
install() { "$work/venv/bin/pip" install -q --no-cache-dir --disable-pip-version-check "$@"; }
# test_with "NAME OF THE CASE" tests...: leaves a report under that name.
test_with() {
  reports+=("$work/$1.xml")
  "$work/venv/bin/python" -m pytest -q -p no:cacheprovider --junitxml="$work/$1.xml" "${@:2}" | tail -n 1
}

for torch in "${torch_versions[@]}"; do
  rm -rf "$work/venv"
  "${PYTHON:-python3}" -m venv "$work/venv"
  echo "torch $torch: installing"
  if ! install "torch==$torch.*" "transformers==${transformers_versions[0]}.*" "pytest==9.*" "numpy<2.4"; then
    reports+=("$work/torch $torch, not installed.xml")
    continue
  fi
  torch=$(version_of torch)
  test_with "torch $torch, ops" "${op_tests[@]}"
  for transformers in "${transformers_versions[@]}"; do
    if ! install "transformers==$transformers.*"; then
      reports+=("$work/torch $torch, transformers $transformers, not installed.xml")
      continue
    fi
    test_with "torch $torch, transformers $(version_of transformers)" tests/model/test_transformers_integration.py
  done
done
rm -rf "$work/venv"
.venv/bin/python scripts/record_tests.py torch-versions cpu "$out" "${reports[@]}"
