"""python -m infra.lock: write constraints.txt and the lock files from what is installed in .venv.

constraints.txt holds the versions that were tested together, for pip's --constraint. The locks hold the same versions
with the SHA-256 of every file of each release, on any platform; torch is left out, since its builds differ by machine.
"""

import re
import subprocess
import sys

from infra.install import LOCKS, ROOT, read_lock

HEADS = {
    "constraints.txt": "# Versions that were tested together; `make install` uses them.",
    "lock.txt": "# What the quickstart needs, with the hashes of its files; torch apart.",
    "lock-correspondence.txt": "# What semantic correspondence needs beside lock.txt.",
    "lock-dev.txt": "# What lint, types and tests need beside the other locks.",
}
TOOLS = {"pip", "setuptools", "wheel", "uv"}
"""Packages that are left out of the constraints: they only install others, and nothing imports them."""


def write(name: str, lines: list[str]) -> None:
    (ROOT / name).write_text("\n".join([f"{HEADS[name]} Rewritten by `make constraints`.", *lines]) + "\n")


def installed() -> list[str]:
    """`NAME==VERSION` of each package except the project, without the machine-specific build label (`+cpu`)."""
    command = [sys.executable, "-m", "pip", "list", "--format=freeze", "--exclude-editable"]
    lines = subprocess.check_output(command, text=True).split()
    return [re.sub(r"\+.*", "", line) for line in lines if line.partition("==")[0].lower() not in TOOLS]


def compiled(*extras: str) -> dict[str, str]:
    """The lock's entries by name for the project with these extras, resolved for every platform."""
    options = [option for extra in extras for option in ("--extra", extra)]
    command = [
        "-m", "uv", "pip", "compile", "pyproject.toml", "--universal", "--generate-hashes", "--no-annotate",
        "--no-header", "--group", "build", "--no-emit-package", "torch", "--constraint", "constraints.txt", *options,
    ]  # fmt: skip
    return read_lock(subprocess.check_output([sys.executable, *command], cwd=ROOT, text=True))


def main() -> None:
    write("constraints.txt", installed())
    held, extras = set[str](), list[str]()
    for extra, name in LOCKS.items():
        extras.append(extra)
        entries = compiled(*extras)
        write(name, [entry for package, entry in entries.items() if package not in held])
        held |= entries.keys()


if __name__ == "__main__":
    main()
