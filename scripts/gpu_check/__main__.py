"""Checks the CUDA kernels on a GPU within a number of minutes; scripts/gpu_check.sh says how to call it."""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runner import Runner, left_out
from stages import BUILD, ROOT, all_stages


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="all of it ends within this time (default: 9)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: build-gpu/check)")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="what scripts/gpu_prebuild.sh made elsewhere")
    parser.add_argument("--dry-run", action="store_true", help="every stage up to its first launch; needs no GPU")
    arguments = parser.parse_args()
    if not 1 <= arguments.minutes <= 600:
        parser.error(f"--minutes must be from 1 to 600, got {arguments.minutes:g}")
    if arguments.prebuilt and not (arguments.prebuilt / "commit").exists():
        parser.error(f"--prebuilt: {arguments.prebuilt} was not made by scripts/gpu_prebuild.sh: it has no file commit")
    return arguments


def commit_of(prebuilt: Path | None) -> str:
    """MIXTRAL_COMMIT, else that of the tree, else that of the prebuilt libraries. Exits where those are of another."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    tree = os.environ.get("MIXTRAL_COMMIT") or head
    if prebuilt is None:
        return tree
    built = (prebuilt / "commit").read_text().strip()
    if tree and built != tree:
        sys.exit(f"gpu_check: {prebuilt} was built from commit {built}, the tree is {tree}: build it again")
    return built


def install(prebuilt: Path) -> None:
    """The libraries to where the Python package looks for them, the programs to where a build puts them."""
    for source, target in (("python", ROOT / "python" / "mixtral"), ("bin", BUILD / "bin")):
        target.mkdir(parents=True, exist_ok=True)
        for file in (prebuilt / source).iterdir():
            shutil.copy2(file, target)


def main() -> int:
    arguments = parse()
    prebuilt = arguments.prebuilt and arguments.prebuilt.resolve()
    out = (arguments.out or BUILD / ("dry-run" if arguments.dry_run else "check")).resolve()
    commit = commit_of(prebuilt)
    if prebuilt:
        install(prebuilt)
    paths = [ROOT / folder for folder in ("python", "tests", "tests/model", "benchmarks", "scripts")]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",  # what a stage has printed is in the log when it is killed
        "PYTHONFAULTHANDLER": "1",
        "MIXTRAL_RECORDS": str(out),
        "MIXTRAL_COMMIT": commit,
    }
    os.chdir(ROOT)
    stages = all_stages(prebuilt)
    if names := [stage.name for stage in left_out(stages, arguments.minutes)]:
        print(f"no time in {arguments.minutes:g} minutes, unless others end early: {', '.join(names)}", flush=True)
    facts = {"commit": commit, "date": datetime.date.today().isoformat(), "minutes": arguments.minutes}
    runner = Runner(out, arguments.minutes, facts, arguments.dry_run)
    failed = runner.run(stages)
    print(f"results: {out}, all in {out / 'gpu_check.tar'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
