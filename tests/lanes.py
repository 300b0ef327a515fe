"""python -m tests.lanes [--coverage]: everything that `make test` runs, in the order in which a failure is most useful.

1. tests of pure functions and files, beside lint, types and import contracts: what fails here is seen at once
2. all others in three processes side by side, for much of a test is one process starting after another; kills come
   last

Prints the time of each part, and at the end a line with the number of tests, the minutes, and the five longest.
With --coverage it counts branches of d2f_core too, in all processes, and prints the table of files.
"""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = ("tests/infra", "tests/data", "tests/train", "tests/batch", "tests/chaos", "tests/test_waiting_for_nodes.py")
"""Half of the tests with servers and workers, by time; the pipelines are most of the other."""
LONGEST = 5


@dataclass(frozen=True)
class Part:
    name: str
    commands: Sequence[Sequence[str]]
    """Run side by side; what the first prints is shown as it comes, the others' afterwards."""


@dataclass(frozen=True)
class Test:
    name: str
    seconds: float
    skipped: bool


def parts(results: Path, runner: Sequence[str]) -> list[Part]:
    def tests(*arguments: str) -> list[str]:
        number = len(list(results.iterdir()))
        file = results / f"{number}.xml"
        file.touch()
        return [sys.executable, *runner, "-m", "pytest", f"--junitxml={file}", *arguments]

    others = [f"--ignore={place}" for place in BESIDE]
    return [
        Part("pure functions, lint and types", [tests("--rung=quick"), ["make", "--no-print-directory", "lint"]]),
        Part(
            "processes, servers and kills",
            [tests("--rung=servers", *others), tests("--rung=servers", *BESIDE), tests("--rung=process")],
        ),
    ]


def run(part: Part) -> int:
    """0, or the exit code of a command that failed."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, str(number)) for number in range(1, len(part.commands))]
        others = [
            subprocess.Popen(command, cwd=ROOT, stdout=output.open("wb"), stderr=subprocess.STDOUT)
            for command, output in zip(part.commands[1:], outputs, strict=True)
        ]
        processes = [subprocess.Popen(part.commands[0], cwd=ROOT), *others]
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


@contextlib.contextmanager
def counted(directory: Path) -> Iterator[None]:
    """All processes that are started now count into files of their own in the directory; afterwards the table is
    printed, and `coverage.json` is kept for comparing two states of the code."""
    os.environ["COVERAGE_FILE"] = str(directory / ".coverage")
    os.environ["PYTHONPATH"] = str(ROOT / "tests/counted")
    yield
    for file in directory.iterdir():
        if not is_whole(file):
            file.unlink()
    for arguments in (["combine", "--quiet"], ["json", "--quiet"], ["report"]):
        subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=True)


def is_whole(file: Path) -> bool:
    """Whether the process that counted lived long enough to write it once."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master")}
    except sqlite3.DatabaseError:
        return False
    return {"file", "arc", "context"} <= tables


def main(arguments: Sequence[str]) -> int:
    coverage = "--coverage" in arguments
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    began, failed = time.monotonic(), 0
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if coverage:
            stack.enter_context(counted(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for part in parts(results, ["-m", "coverage", "run"] if coverage else []):
            print(f"--- {part.name}", flush=True)
            start = time.monotonic()
            code = run(part)
            lines.append(f"{part.name}: {time.monotonic() - start:.0f} s" + (" FAILED" if code else ""))
            print(f"--- {lines[-1]}", flush=True)
            failed = failed or code
            if code:
                break  # what the next part would show is not worth its minutes
        tests = read_results(results)
    print("; ".join(lines))
    print(summary(tests, time.monotonic() - began))
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
