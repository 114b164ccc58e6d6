"""Runs the `mixtral` binary for the tests."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("MIXTRAL_BINARY", ROOT / "build" / "bin" / "mixtral"))
DEMO = ROOT / "models" / "demo"


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def mixtral(*arguments: str | bytes | Path, stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
    options.setdefault("env", environment())
    options.setdefault("stdout", subprocess.PIPE)
    assert BINARY.exists(), f"{BINARY} is missing: build the target mixtral_app, or set MIXTRAL_BINARY"
    return subprocess.run([BINARY, *arguments], input=stdin, stderr=subprocess.PIPE, timeout=120, **options)


def ok(*arguments: str | bytes | Path, **options) -> bytes:
    run = mixtral(*arguments, **options)
    assert run.returncode == 0, run.stderr
    assert run.stderr == b""
    return run.stdout


def ok_json(*arguments: str | bytes | Path, **options) -> dict:
    output = ok(*arguments, "--json", **options)
    assert output.count(b"\n") == 1
    return json.loads(output)


def edit_config(model: Path, **fields: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
