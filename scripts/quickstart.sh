#!/usr/bin/env bash
# Builds the binary and the Python package, and generates text with the bundled model: scripts/quickstart.sh "a prompt" [flags of `mixtral generate`]
set -euo pipefail
root="$(dirname "${BASH_SOURCE[0]}")/.."
prompt="${1:-In the beginning}"
"$root/scripts/setup.sh" app >&2
exec "$root/build/bin/mixtral" generate -p "$prompt" --temp 0.8 --top-p 0.9 --repetition-penalty 1.15 "${@:2}"
