#!/usr/bin/env bash
# From a bare Debian 12 (git, and root or sudo) to a built project: system packages, .venv/, build/. Run again, it does only
# what has changed.
#   scripts/setup.sh          the libraries, the binary and the Python package
#   scripts/setup.sh app      the same, without CUDA kernels where there is no GPU (scripts/quickstart.sh)
#   scripts/setup.sh test     everything, with all tests and their tools
# PYTHON=<interpreter> chooses another Python than python3. MIXTRAL_CUDA=ON|OFF|AUTO says whether CUDA kernels are compiled;
# the default is AUTO, when a CUDA toolkit is found. For `app` a toolkit without a GPU is not enough, but a build that is there
# keeps its setting.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/stages.sh
mode=${1:-run}

packages=(build-essential cmake ninja-build ccache nlohmann-json3-dev libcli11-dev)
[[ -n ${PYTHON:-} ]] || packages+=(python3-venv python3-dev)
test_packages=(libgtest-dev clang clang-format clang-tidy libclang-rt-14-dev nginx-light chromium chromium-driver)
case $mode in
  app | run) target=python_package groups=(build run serve) stages=5 ;;
  test) target=all groups=(build run serve test) packages+=("${test_packages[@]}") stages=5 ;;
  *) echo "setup: expected app, test or nothing, got $mode" >&2; exit 2 ;;
esac

installed_packages() {
  # dpkg-query fails for a package that was never installed.
  { dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true; } | sed -n 's/^installed //p'
}

install_packages() {
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

read_cache() { sed -n "s/^$1:[A-Z]*=//p" build/CMakeCache.txt 2>/dev/null || true; }

cuda_setting() {
  local before
  before=$(read_cache MIXTRAL_CUDA)
  if [[ -n ${MIXTRAL_CUDA:-} ]]; then echo "$MIXTRAL_CUDA"
  elif [[ $mode != app ]]; then echo AUTO
  elif [[ -n $before ]]; then echo "$before"
  elif [[ -e /dev/nvidia0 ]] || nvidia-smi -L >/dev/null 2>&1; then echo AUTO
  else echo OFF
  fi
}

# 1. System packages.
missing=$(comm -23 <(printf '%s\n' "${packages[@]}" | sort) <(installed_packages "${packages[@]}" | sort) | xargs)
if [[ -n $missing ]]; then
  command -v apt-get >/dev/null || { echo "setup: please install: $missing (no apt-get here)" >&2; exit 1; }
  as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "setup: needs root or sudo to install: $missing" >&2; exit 1; }
    as_root=(sudo)
    sudo -v
  fi
  stage "installing $missing" install_packages $missing
else
  skip "system packages are installed"
fi

# 2. The Python environment. The pins live in pyproject.toml alone; a stamp holds those that are installed.
if [[ ! -x .venv/bin/pip ]]; then
  free_gb=$(($(df --output=avail -B1 . | tail -1) / 1000000000)) needed_gb=9
  ((free_gb >= needed_gb)) ||
    { echo "setup: needs $needed_gb GB of free disk, PyTorch most of it; $PWD has $free_gb GB" >&2; exit 1; }
  "${PYTHON:-python3}" -m venv .venv
fi
requirements=$(.venv/bin/python scripts/requirements.py "${groups[@]}")
stamp=.venv/requirements.txt
touch "$stamp"
if grep -qvxFf "$stamp" <<<"$requirements"; then
  stage "installing Python packages into .venv (PyTorch: about 3 GB to fetch)" \
    .venv/bin/pip install -q --disable-pip-version-check -r /dev/stdin <<<"$requirements"
  echo "$requirements" >"$stamp"
else
  skip "Python packages are installed"
fi

# 3. The build description: again when what it depends on has changed.
cuda=$(cuda_setting)
configuration="python $PWD/.venv/bin/python, cuda $cuda, $(cksum <"$stamp"),\
 packages $(installed_packages "${packages[@]}" "${test_packages[@]}" | sort | xargs)"
if [[ ! -f build/build.ninja || $configuration != "$(cat build/configuration.txt 2>/dev/null)" ||
  $cuda != "$(read_cache MIXTRAL_CUDA)" || $PWD/.venv/bin/python != "$(read_cache Python_EXECUTABLE)" ]]; then
  stage "configuring build (CUDA kernels: $cuda)" \
    cmake -S . -B build -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DMIXTRAL_CUDA="$cuda"
  echo "$configuration" >build/configuration.txt
else
  skip "build is configured (CUDA kernels: $cuda)"
fi

# 4. Compiling.
stage "compiling $target with $(nproc) processors" cmake --build build --target "$target"

# 5. The package, editable: only its metadata and the command `mixtral` are installed.
sources=$(cat pyproject.toml setup.py | cksum)
if [[ ! -x .venv/bin/mixtral || $sources != "$(cat .venv/package.txt 2>/dev/null)" ]]; then
  CMAKE_ARGS="-DMIXTRAL_CUDA=$cuda" stage "installing the package into .venv" \
    .venv/bin/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
  echo "$sources" >.venv/package.txt
else
  skip "the package is installed"
fi
