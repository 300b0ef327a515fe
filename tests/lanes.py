"""python -m tests.lanes [--coverage]: everything that `make test` runs, in the order in which a failure is most useful.

1. tests of pure functions and files, beside lint, types and import contracts: what fails here is seen at once
2. all others in three processes side by side, for much of a test is one process starting after another; the third,
   which waits for nothing, gives way to the others; kills come last

Prints the time of each part, and at the end a line with the number of tests, the minutes, and the five longest.
With --coverage it counts branches of d2f_core too, in all processes, and prints the table of files.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
BESIDE = (
    "tests/infra", "tests/data", "tests/train", "tests/test_storage.py", "tests/test_tracking.py",
    "tests/test_registry.py", "tests/chaos",
)  # fmt: skip
"""Half of the tests with servers and workers, by time; the pipelines are most of the other."""
LONGEST = 5


@dataclass(frozen=True)
class Part:
    name: str
    commands: Sequence[Sequence[str]]
    """Run side by side; what the first prints is shown as it comes, the others' afterwards."""

    def start(self, number: int, output: IO[bytes] | None, counts: Path | None) -> subprocess.Popen[bytes]:
        # A file of counts for each: whoever ends first would take what the others have not finished writing.
        variables = {"COVERAGE_FILE": str(counts / f".coverage.{uuid.uuid4().hex}")} if counts else {}
        command, stderr = self.commands[number], subprocess.STDOUT if output else None
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=stderr, env=os.environ | variables)


@dataclass(frozen=True)
class Test:
    name: str
    seconds: float
    skipped: bool


def pytest_command(results: Path, *arguments: str) -> list[str]:
    number = len(list(results.iterdir()))
    file = results / f"{number}.xml"
    file.touch()
    return [sys.executable, "-m", "pytest", f"--junitxml={file}", *arguments]


def parts(results: Path, options: Sequence[str]) -> list[Part]:
    def tests(*arguments: str) -> list[str]:
        return pytest_command(results, *arguments, *options)

    others = [f"--ignore={place}" for place in BESIDE]
    return [
        Part("pure functions, lint and types", [tests("--rung=quick"), ["make", "--no-print-directory", "lint"]]),
        Part(
            "processes, servers and kills",
            [tests("--rung=servers", *others), tests("--rung=servers", *BESIDE), ["nice", *tests("--rung=process")]],
        ),
    ]


def run(part: Part, counts: Path | None) -> int:
    """0, or the exit code of a command that failed."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, str(number)) for number in range(1, len(part.commands))]
        others = [part.start(number, output.open("wb"), counts) for number, output in enumerate(outputs, 1)]
        processes = [part.start(0, None, counts), *others]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:  # one that is terminated takes its servers with it
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait()
            for output in outputs:
                sys.stdout.flush()
                sys.stdout.buffer.write(output.read_bytes())
    return next((code for code in codes if code), 0)


def read_results(results: Path) -> list[Test]:
    found = []
    for file in sorted(results.iterdir()):
        if not file.stat().st_size:
            continue
        for case in ElementTree.parse(file).iter("testcase"):
            module = case.get("classname", "").replace(".", "/")
            name = f"{module}.py::{case.get('name')}"
            found.append(Test(name, float(case.get("time", 0)), case.find("skipped") is not None))
    return found


def summary(tests: Sequence[Test], seconds: float) -> str:
    """One line: how many tests ran, in how many minutes, and which took longest."""
    longest = sorted(tests, key=lambda test: -test.seconds)[:LONGEST]
    ran = sum(not test.skipped for test in tests)
    names = "; ".join(f"{test.name} {test.seconds:.0f} s" for test in longest)
    return f"{ran} tests ran in {seconds / 60:.1f} minutes, {len(tests) - ran} were left out; the longest: {names}"


def report_coverage(counts: Path) -> None:
    """The table of files, and `coverage.json` beside it for comparing two states of the code."""
    for arguments in (["combine", "--quiet", str(counts)], ["json", "--quiet"], ["report"]):
        subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=True)


def main(arguments: Sequence[str]) -> int:
    coverage = "--coverage" in arguments
    options = ["--cov", "--cov-report="] if coverage else []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    began, failed = time.monotonic(), 0
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as counts:
        results = Path(directory)
        for part in parts(results, options):
            print(f"--- {part.name}", flush=True)
            start = time.monotonic()
            code = run(part, Path(counts) if coverage else None)
            lines.append(f"{part.name}: {time.monotonic() - start:.0f} s" + (" FAILED" if code else ""))
            print(f"--- {lines[-1]}", flush=True)
            failed = failed or code
            if code:
                break  # what the next part would show is not worth its minutes
        tests = read_results(results)
        if coverage:
            report_coverage(Path(counts))
    print("; ".join(lines))
    print(summary(tests, time.monotonic() - began))
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
