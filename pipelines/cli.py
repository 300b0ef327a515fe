"""The command line that all jobs share: a recipe name or `--config FILE`, flags for single fields, `--dry-run`.

A job's module imports only configs at its top, so that `--help` and a misspelt flag are answered within a second. Its
`main` and `check` import what they run (torch, Ray and so on), which takes several seconds.
"""

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import dacite
import tyro
import yaml

from d2f_core import storage
from d2f_core.identity import filled

Config = TypeVar("Config")


class UnfinishedError(RuntimeError):
    """Work that is done but for a part, which the same command makes up."""


LOG_FORMAT = "%(asctime)s %(message)s"


def to_yaml(config: Any) -> str:
    """The resolved config as YAML; given through `--config`, it describes the same run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(kind: type[Config], text: str, *, source: str) -> Config:
    """Read a config, refusing unknown fields and wrong types.

    Raises:
        ValueError: names the file and the field.
    """
    try:
        given = filled(kind, yaml.safe_load(text) or {})
        return dacite.from_dict(kind, given, dacite.Config(strict=True, cast=[tuple, float]))
    except (dacite.DaciteError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} is no {kind.__name__}: {' '.join(str(error).split())}. See --help for the fields."
        ) from None


def _from_yaml_of(kinds: Sequence[type[Config]], text: str, *, source: str) -> Config:
    """Like `from_yaml`, for the first of several kinds of config that has all fields of the text, or else for the first
    kind.
    """
    for kind in kinds:
        fields = {field.name for field in dataclasses.fields(cast(Any, kind))}
        with contextlib.suppress(yaml.YAMLError, TypeError):
            if set(yaml.safe_load(text)) <= fields:
                return from_yaml(kind, text, source=source)
    return from_yaml(kinds[0], text, source=source)


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove `--flag VALUE` or `--flag=VALUE` and return the value."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            if index + 1 == len(arguments):
                raise ValueError(f"{flag} needs a value: a YAML file, local or s3://.")
            value = arguments[index + 1]
            del arguments[index : index + 2]
            return value
        if argument.startswith(f"{flag}="):
            del arguments[index]
            return argument.partition("=")[2]
    return None


def resolve(job: str, recipes: Mapping[str, Config], arguments: Sequence[str]) -> tuple[Config, bool]:
    """The config that the arguments describe, and whether `--dry-run` was given. Recipes may have different types.

    Raises:
        ValueError: an unknown recipe, an unreadable file or a field's own rule.
    """
    rest = list(arguments)
    dry_run = "--dry-run" in rest
    rest = [argument for argument in rest if argument != "--dry-run"]
    file = _take(rest, "--config")
    if file is not None:
        try:
            text = storage.read_bytes(file).decode()
        except FileNotFoundError:
            raise ValueError(f"--config {file!r} does not exist. Give a YAML file, local or s3://.") from None
        default = _from_yaml_of(list(dict.fromkeys(map(type, recipes.values()))), text, source=file)
    elif rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in recipes:
            raise ValueError(f"unknown recipe {name!r} for {job}. Known: {', '.join(recipes)}.")
        default = recipes[name]
    elif "--help" in rest or "-h" in rest:
        print(f"usage: python -m pipelines.{job} RECIPE | --config FILE.yaml [--dry-run] [field flags]")
        print(f"recipes: {', '.join(recipes)}\n")
        default = next(iter(recipes.values()))
    else:
        raise ValueError(f"{job} needs a recipe ({', '.join(recipes)}) or --config FILE.yaml.")
    # Recipe or file determine whether an optional part exists; flags change only fields.
    flat = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(type(default), args=rest, default=default, prog=f"python -m pipelines.{job}", config=flat), dry_run


def run_job(
    job: str,
    recipes: Mapping[str, Config],
    main: Callable[[Config], object],
    check: Callable[[Config], object] | None = None,
) -> None:
    """Entry point of `python -m pipelines.JOB`; exits 2 with one line for what the user can mend, and 3 with one for
    what the same command makes up.

    Args:
        check: checks all inputs without side effects, for `--dry-run`.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "botocore", "aiobotocore", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config, dry_run = resolve(job, recipes, sys.argv[1:])
        if not dry_run:
            main(config)
            return
        if check:
            check(config)
        print(to_yaml(config), end="")
        looked = "inputs were checked" if check else "it has no inputs to check"
        print(f"# dry run: {job} would start with this config; {looked}, nothing was done.")
    except UnfinishedError as error:
        print(f"unfinished: {error}", file=sys.stderr)
        sys.exit(3)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("D2F_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
