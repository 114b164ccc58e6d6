"""Turns JUnit reports of pytest or GoogleTest into one correctness record.

record_tests.py NAME cpu|cuda FOLDER REPORT.xml...
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from common import Bench, Row  # noqa: E402


def rows_of(reports: list[Path]) -> list[Row]:
    """A row for each report, named after its file; no case passed where a report is missing."""
    rows = []
    for report in reports:
        if not report.exists():
            rows.append(Row(report.stem, "cases passed", 0, "cases"))
            continue
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        run = _sum(suites, "tests") - _sum(suites, "skipped") - _sum(suites, "disabled")
        passed = run - _sum(suites, "failures") - _sum(suites, "errors")
        rows.append(Row(report.stem, "cases passed", passed, "cases", run, 100 * passed / run if run else 0.0))
    return rows


def _sum(suites: list[ElementTree.Element], count: str) -> int:
    return sum(int(suite.get(count, 0)) for suite in suites)


def main(name: str, device: str, out: Path, reports: list[Path]) -> None:
    """Write the record and print its rows; a missing report ends in an error."""
    bench = Bench(name, device)
    bench.rows = rows_of(reports)
    for row in bench.rows:
        print(f"{row.case:44s} {row.value} of {row.bound or 'no'} cases passed")
    bench.write(out)
    if missing := [row.case for row in bench.rows if row.bound is None]:
        sys.exit(f"no report: {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [Path(argument) for argument in sys.argv[4:]])
