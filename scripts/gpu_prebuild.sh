#!/usr/bin/env bash
# Builds here, without a GPU, what scripts/gpu_check.sh runs on another machine, so that no time there goes into building:
#   scripts/gpu_prebuild.sh DIR         then on the machine with the GPU: scripts/gpu_check.sh --prebuilt DIR
# DIR gets the stripped libraries and programs, the commit, and the headers of nlohmann/json for the case that the
# libraries do not load there and it must build after all. The other machine needs the same minor version of torch and
# a C library no older than this one's. PYTHON chooses the interpreter: mixtral._C loads in the same version of Python
# alone; elsewhere the model is checked through the binary.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
dir=${1:?"gpu_prebuild: say into which folder"}
git diff --quiet HEAD || { echo "gpu_prebuild: commit the changes first: records name the commit" >&2; exit 1; }

cmake -S . -B build-gpu -G Ninja -DPython_EXECUTABLE="$python" -DMIXTRAL_CUDA=ON
cmake --build build-gpu --target python_package mixtral_tensor_maps

rm -rf "$dir"
mkdir -p "$dir/python" "$dir/bin" "$dir/include"
abi=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
cp python/mixtral/libmixtral_ops.so python/mixtral/libmixtral.so "python/mixtral/_C$abi" "$dir/python"
cp build-gpu/bin/mixtral_tensor_maps "$dir/bin"
if [[ -e build-gpu/bin/mixtral ]]; then cp build-gpu/bin/mixtral "$dir/bin"; fi
strip --strip-unneeded "$dir"/python/* "$dir"/bin/*
json=$(sed -n 's/^NLOHMANN_JSON_INCLUDE_DIR:PATH=//p' build-gpu/CMakeCache.txt)
cp -r "$json/nlohmann" "$dir/include"
git rev-parse HEAD >"$dir/commit"

newest() { readelf --version-info "$dir"/python/* "$dir"/bin/* | grep -o "Name: $1_[0-9.]*" | sort -Vu | tail -n 1; }
echo "$dir: $(du -sh "$dir" | cut -f 1), _C$abi; needs at least $(newest GLIBC), $(newest GLIBCXX)" | sed 's/Name: //g'
