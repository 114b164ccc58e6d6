#!/usr/bin/env bash
# Sets up everything and runs all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
build/bin/mixtral_tests --gtest_brief=1
build/bin/mixtral_gpu_emulator_tests --gtest_brief=1
exec .venv/bin/python -m pytest "$@"
