#!/usr/bin/env bash
# From a bare Debian 12 (git, and root or sudo) to a built project: system packages, .venv/, build/. Safe to run again.
#   scripts/setup.sh          what is needed to run
#   scripts/setup.sh test     and to test
# PYTHON=<interpreter> chooses another Python than python3; MIXTRAL_CUDA=ON|OFF overrides the search for a CUDA toolkit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(build-essential cmake ninja-build ccache libsentencepiece-dev nlohmann-json3-dev libcli11-dev)
[[ -n ${PYTHON:-} ]] || packages+=(python3-venv python3-dev)
[[ ${1:-} == test ]] && packages+=(libgtest-dev)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  command -v apt-get >/dev/null || { echo "setup: please install: ${missing[*]} (no apt-get here)" >&2; exit 1; }
  as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "setup: needs root or sudo to install: ${missing[*]}" >&2; exit 1; }
    as_root=(sudo)
  fi
  echo "setup: installing ${missing[*]}"
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

if [[ ! -x .venv/bin/python ]]; then
  free_gb=$(($(df --output=avail -B1 . | tail -1) / 1000000000)) needed_gb=9
  ((free_gb >= needed_gb)) ||
    { echo "setup: needs $needed_gb GB of free disk, PyTorch most of it; $PWD has $free_gb GB" >&2; exit 1; }
  "${PYTHON:-python3}" -m venv .venv
fi
# The pins live in pyproject.toml alone.
echo "setup: installing Python packages (PyTorch is large)"
.venv/bin/python scripts/requirements.py build run ${1:+"$1"} | .venv/bin/pip install -q -r /dev/stdin
cmake -S . -B build -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" ${MIXTRAL_CUDA:+-DMIXTRAL_CUDA="$MIXTRAL_CUDA"}
cmake --build build
.venv/bin/pip install -q --no-build-isolation --no-deps -e .
