#!/usr/bin/env bash
# What is too long for the tests of the server. Logs go to build/soak/; exit status 0 when all passed.
#   scripts/serve_soak.sh [answers] [load] [bodies] [schema] [formats]     without names: all
#   answers 500 random requests, streamed, whole and in process: the same text, tokens, log probabilities, usage and end
#   load    10 000 requests on 64 connections, with streams, cuts, invalid and too long ones among them
#   bodies  5 000 generated bodies, and a canary after every 100
#   schema  2 000 cases of schemathesis over /openapi.json
#   formats 1 000 random JSON schemas that answers of random weights must fit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=python:benchmarks:tests/server MIXTRAL_SERVER_CASES=500
mkdir -p build/soak
status=0
(($#)) || set -- answers load bodies schema formats
for name in "$@"; do
  case $name in
    answers) command=(-m pytest -q tests/server/test_same_answers.py) ;;
    load) command=(tests/server/soak.py --requests 10000 --connections 64) ;;
    bodies) command=(tests/server/generated_bodies.py --count 5000) ;;
    schema) command=(tests/server/schema_cases.py --count 2000) ;;
    formats) command=(tests/server/schema_campaign.py 1000) ;;
    *) echo "serve_soak: expected answers, load, bodies, schema or formats, got $name" >&2; exit 2 ;;
  esac
  echo "== $name"
  .venv/bin/python "${command[@]}" 2>&1 | tee "build/soak/$name.log" || status=1
done
exit $status
