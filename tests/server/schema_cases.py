"""Schemathesis over the server's own /openapi.json: no case is an error of the server's.

.venv/bin/python tests/server/schema_cases.py --count 2000
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import ServerProcess, small_server  # noqa: E402

CHECKS = "not_a_server_error,content_type_conformance,response_headers_conformance"


def run(server: ServerProcess, count: int) -> tuple[int, int, str]:
    """-> the exit status of schemathesis, cases that it sent, and what it said."""
    paths = json.loads(server.get("/openapi.json").body)["paths"]
    operations = sum(len(methods) for methods in paths.values())  # half of them have nothing to vary
    program = os.environ.get("SCHEMATHESIS") or shutil.which("st")
    if program is None:
        raise SystemExit(
            "schema_cases: install schemathesis (pipx install schemathesis), or name its program in SCHEMATHESIS"
        )
    command = [program, "run", f"{server.url}/openapi.json", "--checks", CHECKS, "--seed", "0"]
    command += [
        "--max-examples",
        str(-(-5 * count // (2 * operations))),
        "--request-timeout",
        "60",
        "--continue-on-failure",
    ]
    command += ["--phases", "examples,fuzzing", "--suppress-health-check", "all"]
    environment = {**os.environ, "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:  # it keeps a cache in the folder where it runs
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=1800)
    text = done.stdout + done.stderr
    cases = re.search(r"(\d+) generated", text)
    return done.returncode, int(cases.group(1)) if cases else 0, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    with small_server(model={"ctx_size": 64}) as server:  # so that answers are short
        status, cases, text = run(server, arguments.count)
        errors = [line for line in server.lines if line.get("status", 0) >= 500]
        alive = server.process.poll() is None
    print(text)
    print(f"{cases} cases; answers >= 500: {len(errors)}", *errors[:10], sep="\n  ")
    fine = alive and not errors and status == 0 and cases >= arguments.count
    print("passed" if fine else "FAILED")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
