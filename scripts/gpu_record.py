"""Turns pytest's JUnit reports into one correctness record: ``gpu_record.py NAME OUT_FOLDER REPORT.xml...``."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from common import Bench, Row  # noqa: E402


def main(name: str, out: Path, reports: list[Path]) -> None:
    """Write the record; a report that is missing counts as no case passed and ends in an error."""
    bench = Bench(name, "cuda")
    missing = []
    for report in reports:
        if not report.exists():
            missing.append(report)
            continue
        suite = ElementTree.parse(report).getroot().find("testsuite")
        run = int(suite.get("tests")) - int(suite.get("skipped"))
        passed = run - int(suite.get("failures")) - int(suite.get("errors"))
        bench.rows.append(Row(report.stem, "cases passed", passed, "cases", run, 100 * passed / run if run else 0.0))
        print(f"{report.stem:20s} {passed} of {run} cases passed")
    bench.write(out)
    if missing:
        sys.exit(f"no report: {', '.join(map(str, missing))}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
