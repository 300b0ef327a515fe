"""python -m tests.versions [ENVIRONMENT ...]: open the exports of a tiny model in other releases, and compare outputs.

Prints a table, writes it with the differences to docs/results/versions.json when no environment is named, and exits
with 1 when an export opens otherwise than it should. About 3 GB of packages are kept in .versions.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.versions.cases import Case, make_cases
from tests.versions.environments import ENVIRONMENTS, python_of
from tests.versions.outcomes import RESULTS, Outcome, judge, table, write

OPENING = Path(__file__).with_name("opening.py")
SECONDS = 600


def main(environments: Sequence[str]) -> int:
    """Returns the exit status."""
    torch.set_num_threads(1)  # a tiny network only waits for more
    with tempfile.TemporaryDirectory() as scratch:
        cases = make_cases(Path(scratch))
        outcomes = [outcome for name in environments for outcome in opened(name, cases, Path(scratch))]
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if outcome.unexpected]
    for outcome in bad:
        print(f"unexpected: {outcome.environment}, {outcome.case}: {outcome.said}", file=sys.stderr)
    if list(environments) == list(ENVIRONMENTS):
        write(outcomes, {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": platform.machine()})
        print(f"wrote {RESULTS}")
    return 1 if bad else 0


def opened(environment: str, cases: Sequence[Case], scratch: Path) -> list[Outcome]:
    """What comes of the cases in an environment; those that import this project in a process of their own."""
    python, here = python_of(environment), [case for case in cases if environment in case.environments]
    alone = [case for case in here if "package" not in case.arguments]
    apart = [alone, *([case] for case in here if "package" in case.arguments)]
    said = [line for part in apart for line in _run(environment, python, part, scratch)]
    ordered = [case for part in apart for case in part]
    return [judge(environment, case, line) for case, line in zip(ordered, said, strict=True)]


def _run(environment: str, python: Path, cases: Sequence[Case], scratch: Path) -> list[dict]:
    from safetensors.torch import save_file

    if not cases:
        return []
    given = []
    for number, case in enumerate(cases):
        save_file({"expected": case.expected.contiguous()}, expected := scratch / f"expected-{number}.safetensors")
        given.append({"name": case.name, "reader": case.reader, "expected": str(expected), **case.arguments})
    (scratch / "cases.json").write_text(json.dumps(given))
    # -I: neither the current directory nor the user's own packages are importable.
    command = [str(python), "-I", str(OPENING), str(scratch / "cases.json")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=scratch, timeout=SECONDS, check=False, env=one_thread
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    if len(lines) != len(cases):
        raise RuntimeError(f"{environment} opened {len(lines)} of {len(cases)} exports:\n{done.stderr[-3000:]}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", choices=[*ENVIRONMENTS, []], metavar="ENVIRONMENT")
    sys.exit(main(parser.parse_args().environments or list(ENVIRONMENTS)))
