#!/usr/bin/env bash
# Sets up everything, checks the form of the code and runs all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
scripts/lint.sh
build/bin/mixtral_tests --gtest_brief=1
build/bin/mixtral_gpu_emulator_tests --gtest_brief=1
scripts/fuzz.sh
# Two files at a time: many tests wait, for a process to start or for a time to pass.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
