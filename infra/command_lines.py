"""Checks a command's arguments with the program's own parser, which is stopped before the program does anything."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ("python", "python3", ".venv/bin/python")
OTHERS = {"git", "aws", "pip", "curl", "cd", "source", ".", "cat", "ls", "mkdir"}
"""Programs whose arguments are not checked."""
READS_ARGUMENTS = re.compile(r"\b(run_job|tyro\.cli|parse_args)\(")


class _Read(BaseException):
    """Signals that a command line was parsed without errors. A BaseException, so that no handler of errors catches
    it.
    """


def problem(argv: Sequence[str]) -> str | None:
    """Why the command cannot be started as written; None if no error is found without starting it."""
    program, *rest = argv
    rules: Mapping[str, Callable[[Sequence[str]], str | None]] = {
        "make": _make,
        "ray": _ray,
        "pytest": _pytest,
        **dict.fromkeys(PYTHON, _python),
        **dict.fromkeys(OTHERS, lambda _: None),
    }
    if program not in rules:
        return f"{program!r} is not known here. Add it to OTHERS of infra/command_lines.py when it is no typing error."
    return rules[program](rest)


def _python(rest: Sequence[str]) -> str | None:
    match rest:
        case ["-m", "pytest", *others]:
            return _pytest(others)
        case ["-m", ("pip" | "venv"), *_] | ["-", *_]:
            return None
        case ["-m", module, *others]:
            return _module(module, others)
        case ["-c", text, *_]:
            return _compiles(text)
        case [file, *_] if (ROOT / file).is_file():
            return None
        case _:
            return f"python {' '.join(rest)}: there is no such file or module."


def _compiles(text: str) -> str | None:
    try:
        ast.parse(text)
    except SyntaxError as error:
        return f"python does not understand it: {error}"
    return None


def _make(targets: Sequence[str]) -> str | None:
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    unknown = [target for target in targets if "=" not in target and target not in known]
    return f"make {unknown[0]}: there is no such target. Known: {', '.join(known)}." if unknown else None


def _pytest(arguments: Sequence[str]) -> str | None:
    missing = [word for word in arguments if word.startswith("tests") and not (ROOT / word.split("::")[0]).exists()]
    return f"{missing[0]} does not exist." if missing else None


def _ray(arguments: Sequence[str]) -> str | None:
    """Check a `ray` command with Ray's own parser; the part after `--` is checked as a command too."""
    import click
    import ray.scripts.scripts

    own, _, command = (list(part) for part in _partition(arguments, "--"))
    complaint = problem(command) if command else None
    if complaint:
        return complaint
    step: Any = ray.scripts.scripts.cli
    try:
        while isinstance(step, click.Group):
            name = own.pop(0) if own else ""
            if name not in step.commands:
                return f"ray has no command {name!r}. Known: {', '.join(sorted(step.commands))}."
            step = step.commands[name]
        step.make_context(step.name, [*own, *(["--", *command] if command else [])])
    except click.ClickException as error:
        return error.format_message()
    return None


def _partition(words: Sequence[str], mark: str) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    at = list(words).index(mark) if mark in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


def _module(module: str, arguments: Sequence[str]) -> str | None:
    """Check `python -m MODULE` with the module's own parser, and then a command among its arguments."""
    complaint = read_by_module(module, tuple(arguments))
    _, _, command = _partition(arguments, "--")
    return complaint or (problem(command) if command else None)


@functools.cache
def read_by_module(module: str, arguments: tuple[str, ...]) -> str | None:
    """Parse the arguments of `python -m MODULE` in this process; returns its error message, or None.

    A module without a command line is not started; only its existence is checked.
    """
    file = _file_of(module)
    if file is None:
        return f"python -m {module}: there is no such module."
    if not arguments or not READS_ARGUMENTS.search(file.read_text()):
        return None
    said = io.StringIO()
    try:
        with _stopped_when_read(), mock.patch.object(sys, "argv", [str(file), *arguments]):
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_path(str(file), run_name="__main__")
    except _Read:
        return None
    except SystemExit as end:
        return " ".join(said.getvalue().split()) if end.code else None
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return f"python -m {module} did not read its arguments."


def _file_of(module: str) -> Path | None:
    """The file that `python -m` would run; None if it does not exist or does not belong to this project."""
    try:
        spec = importlib.util.find_spec(module)
        if spec and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        return None
    file = Path(spec.origin) if spec and spec.origin else None
    return file if file and file.is_relative_to(ROOT) else None


@contextlib.contextmanager
def _stopped_when_read() -> Iterator[None]:
    """Context in which the argument parsers of jobs, benchmarks and tools raise `_Read` after parsing."""
    import tyro

    from pipelines import cli

    def stops(read: Callable[..., Any]) -> Callable[..., Any]:
        def then_stop(*positional: Any, **named: Any) -> None:
            read(*positional, **named)
            raise _Read

        return then_stop

    def job(name: str, recipes: Mapping[str, Any], *_: Any) -> None:
        cli.resolve(name, recipes, _without_file(sys.argv[1:], next(iter(recipes))))

    with (
        mock.patch.object(cli, "run_job", stops(job)),
        mock.patch.object(tyro, "cli", stops(tyro.cli)),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stops(argparse.ArgumentParser.parse_args)),
    ):
        yield


def _without_file(arguments: Sequence[str], recipe: str) -> list[str]:
    """The arguments with `--config FILE` replaced by a recipe, because the file does not exist."""
    kept, _, after = _partition(arguments, "--config")
    return [recipe, *kept, *after[1:]] if after else list(kept)


@functools.cache
def known_flags() -> frozenset[str]:
    """Every flag of the jobs, benchmarks and tools, as their `--help` prints them, for all kinds of recipes."""
    from pipelines import cli

    said = io.StringIO()

    def helps(name: str, recipes: Mapping[str, Any], *_: Any) -> None:
        for recipe in {type(config): recipe for recipe, config in recipes.items()}.values():
            with contextlib.suppress(SystemExit):
                cli.resolve(name, recipes, [recipe, "--help"])

    files = [file for room in ("pipelines", "benchmarks") for file in sorted((ROOT / room).glob("*.py"))]
    tools = [ROOT / "infra/local/__main__.py", ROOT / "infra/install.py"]
    with mock.patch.object(cli, "run_job", helps), contextlib.redirect_stdout(said):
        for file in [*tools, *(file for file in files if READS_ARGUMENTS.search(file.read_text()))]:
            with mock.patch.object(sys, "argv", [str(file), "--help"]), contextlib.suppress(SystemExit):
                runpy.run_path(str(file), run_name="__main__")
    return frozenset({*re.findall(r"--[a-z][\w.-]+", said.getvalue()), "--dry-run", "--config"})
