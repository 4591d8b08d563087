"""Owns the run of all tests that need a GPU: in parallel, each with a limit, the first failure of each worker apart."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from machine import write_whole

DESCRIPTION = """\
Runs every test that needs a GPU (named test_gpu..., or with a parameter called on_gpu), several at a time where
pytest-xdist is installed, each with a limit of time where pytest-timeout is. A fault on a GPU loses the context of its
process, and what comes after it in the same worker fails too: so the first failure of each worker is what to read.
"""

EPILOG = """\
examples:
  python benchmarks/gpu_tests.py
  python benchmarks/gpu_tests.py --workers 4 --json tests.json
"""

ROOT = Path(__file__).resolve().parent.parent
LINES = 40  # of a failure that are kept


class Results:
    """Counts what pytest reports and writes it into a file as it goes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.record: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "first_failures": [], "failures": []}
        self.reports = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test has ended."""
        if report.failed:
            node = getattr(report, "node", None)  # of pytest-xdist, also where the worker has died
            worker = getattr(report, "worker_id", None) or (node.gateway.id if node else "the only process")
            self.record["failed"] += 1
            self.record["failures"].append(report.nodeid)
            first = self.record["first_failures"]
            if all(failure["worker"] != worker for failure in first):
                lines = str(report.longreprtext or report.longrepr).splitlines()
                first.append({"worker": worker, "test": report.nodeid, "text": "\n".join(lines[-LINES:])})
        elif report.skipped:
            self.record["skipped"] += 1
        elif report.when == "call":
            self.record["passed"] += 1
        self.reports += 1
        if report.failed or self.reports % 20 == 0:
            self.write()

    def write(self) -> None:
        """Writes the file, if one is asked for."""
        if self.path is not None:
            write_whole(self.path, json.dumps(self.record, indent=1) + "\n")


def main() -> int:
    """Runs the tests; pytest's exit code, or 1 where none passed."""
    options = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="counts and first failures, written as it goes")
    options.add_argument("--workers", type=int, default=min(10, os.cpu_count() or 1))
    options.add_argument("--limit", type=int, default=100, help="seconds for one test (default: 100)")
    options.add_argument("--instead", help="without a GPU: tests that do not need one, by a part of their name")
    options.add_argument("--folder", type=Path, default=ROOT / "tests", help="where they are (default: tests)")
    settings = options.parse_args()
    results = Results(settings.json)
    results.write()
    wanted = "test_gpu or on_gpu"
    if settings.instead:  # beside those that are skipped, but not those that take the CPU where there is no GPU
        wanted = f"({wanted} or {settings.instead}) and not gpu_or_cpu"
    files = [
        str(path)
        for path in sorted(settings.folder.glob("test_*.py"))
        if re.search(rf"(?m)^def test_gpu|on_gpu|ON_GPU|{settings.instead or 'ON_GPU'}", path.read_text())
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-k", wanted, "-q", "--tb", "short"]
        arguments += ["-o", "addopts=--strict-markers", "-o", f"cache_dir={folder}", "--maxfail", "60"]
        arguments += ["-W", "ignore::lion8bit.SlowBackendWarning", "--disable-warnings"]
        if importlib.util.find_spec("xdist") is not None and settings.workers > 1:
            arguments += ["-n", str(settings.workers), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            # By a thread, which also ends a worker that waits for a kernel.
            arguments += ["--timeout", str(settings.limit), "--timeout-method", "thread"]
        code = int(pytest.main([*arguments, *files], plugins=[results]))
    results.write()
    record = results.record
    for failure in record["first_failures"]:
        print(f"\nFIRST FAILURE of {failure['worker']}: {failure['test']}\n{failure['text']}")
    print(f"{record['passed']} passed, {record['failed']} failed, {record['skipped']} skipped", flush=True)
    return code or int(record["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
