"""python -m infra.docs_check [PAGE ...]: run the commands that the docs show, in the order of the pages, at toy size.

Runs in a copy of the project in a temporary directory, with its own local servers and home directory. A page is one
shell session, as for its reader, and begins with `source .local/env`. If pages are given, the first page with commands
runs before them, because the others build on its results.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from infra.docs_commands import ROOT, SHELL, Block, blocks, pages, place, session

FEW_STEPS = "num-steps 2, warmup-steps 0, checkpoint-every 2, evaluate-every 0"
SCENES = "num-scenes 80"
TOY = {
    # The quickstart is small enough as it is.
    "pipelines.finetune": f"train: {FEW_STEPS}",
    "pipelines.train_autoencoder": f"train: {FEW_STEPS}",
    "pipelines.make_dataset depth": f": {SCENES}",
    "pipelines.make_dataset depth-test": ": num-scenes 8",
    "pipelines.predict_depth": ": steps 1 2, ensemble 2",
    "pipelines.evaluate": ": evaluations 2 4, straightness-prompts 0, chunk-size 16",
    "pipelines.workflow reflow": (
        f": rounds 1, num-pairs 32; generate: steps 2; finetune.train: {FEW_STEPS}; "
        "evaluate: evaluations 2 4, straightness-prompts 0"
    ),
    "pipelines.workflow emoji-96": f"finetune.train: {FEW_STEPS}; generate: steps 2",
    "pipelines.workflow depth": (
        f"dataset: {SCENES}; test: num-scenes 8; decoder.train: {FEW_STEPS}; finetune.train: {FEW_STEPS}; "
        "predict: steps 1 2, ensemble 2"
    ),
    "benchmarks.v_twin": ": steps 2",
}
"""Flags that make a command small, by module and recipe, or only by module; each list of flags follows the part of the
config that it belongs to."""
PLACES = {"http://HEAD:8265": "$RAY_API_SERVER_ADDRESS", "/data/": "$HOME/"}
"""Placeholders for the reader's own addresses and directories -> their values in this check."""
FOREIGN = re.compile(r"(AWS|MLFLOW|RAY|D2F)_")
"""Environment variables that are removed, because a new reader does not have them."""
BEFORE = r"""
set -euo pipefail
unset BASH_ENV
PATH="$PWD/.venv/bin:$PATH"
[ ! -f .local/env ] || source .local/env
for name in python ray make; do
    eval "$name() { command python -m infra.docs_check --step \"\$0:\${BASH_LINENO[0]}\" $name \"\$@\"; }"
done
"""
STEP, LOG = "--step", "../docs-check.log"
"""The log of all commands is outside the project, because it would be uploaded with every submitted job."""
TAIL = 4000
"""Number of last characters of a failed command's output that are shown."""


def small(argv: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """The command at toy size, with placeholders replaced."""
    words = [replaced(word, variables) for word in argv]
    modules = [at + 1 for at, word in enumerate(words[:-1]) if word == "-m"]
    if not modules:
        return words
    module, recipe = words[modules[-1]], " ".join(words[modules[-1] : modules[-1] + 2])
    return [*words, *flags(TOY.get(recipe) or TOY.get(module) or "")]


def replaced(word: str, variables: Mapping[str, str]) -> str:
    for shown, there in PLACES.items():
        word = word.replace(shown, re.sub(r"\$(\w+)", lambda name: variables.get(name[1], ""), there))
    return word


def flags(entry: str) -> Iterator[str]:
    """`train: num-steps 2, seed 1` -> --train.num-steps 2 --train.seed 1."""
    for part in filter(None, entry.split("; ")):
        prefix, _, settings = part.partition(":")
        for setting in settings.strip().split(", "):
            name, *values = setting.split()
            yield from (f"--{prefix}.{name}" if prefix else f"--{name}", *values)


def step(where: str, argv: Sequence[str]) -> int:
    """Run one command of a page, print its duration and, if it fails, the end of its output; returns its exit code."""
    command = small(argv, os.environ)
    print(f"{Path(where).name}: {shlex.join(command)[:200]}", end="", flush=True)
    began = time.monotonic()
    with Path(LOG).open("a+b") as log:
        start = log.seek(0, os.SEEK_END)
        code = subprocess.run(command, stdout=log, stderr=log).returncode
        log.seek(start)
        said = log.read().decode(errors="replace")
    print(f"  {time.monotonic() - began:.0f} s" + (f"\n{said[-TAIL:]}\nfailed ({code})" if code else ""), flush=True)
    return code


def to_run(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == SHELL and block.treatment == "run"]


def chosen(names: Sequence[str]) -> list[Path]:
    """The pages to run; raises ValueError for a page without commands."""
    running = [page for page in pages() if to_run(page)]
    asked = [Path(name).resolve() for name in names]
    unknown = [str(page) for page in asked if page not in running]
    if unknown:
        known = ", ".join(str(page.relative_to(ROOT)) for page in running)
        raise ValueError(f"{unknown[0]} has no block to run. Pages with one: {known}.")
    return [page for page in running if not asked or page in asked or page == running[0]]


def copy_project(target: Path) -> None:
    """Copy the files that git tracks or would add, and link this checkout's packages."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(ROOT / ".venv")


@contextlib.contextmanager
def readers_machine() -> Iterator[tuple[Path, dict[str, str]]]:
    """Context with a copy of the project and the environment of a user who has just cloned it; ends its servers at
    exit.
    """
    with tempfile.TemporaryDirectory(prefix="d2f-docs-", ignore_cleanup_errors=True) as directory:
        project, home = Path(directory, "project"), Path(directory, "home")
        home.mkdir()
        copy_project(project)
        environment = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        try:
            yield project, {**environment, "HOME": str(home)}
        finally:
            subprocess.run([".venv/bin/python", "-m", "infra.local", "down"], cwd=project, check=False)


def run_page(page: Path, project: Path, environment: Mapping[str, str]) -> int:
    """Run a page; returns the exit code of its first command that fails, or 0."""
    script, before = project.parent / page.name, project.parent / "before.sh"
    script.write_text(session(to_run(page)))
    before.write_text(BEFORE)
    variables = {**environment, "BASH_ENV": str(before)}
    return subprocess.run(["bash", str(script)], cwd=project, env=variables, stdin=subprocess.DEVNULL).returncode


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [STEP]:
        return step(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(prog="python -m infra.docs_check", description="Run what the pages show.")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="only these, and the first before them")
    try:
        asked = chosen(parser.parse_args(arguments).pages)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    with readers_machine() as (project, environment):
        for page in asked:
            if code := run_page(page, project, environment):
                print(f"{place(page, 1)}: a command failed ({code})", file=sys.stderr)
                return 1
    print(f"the commands of {len(asked)} pages ran in {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
