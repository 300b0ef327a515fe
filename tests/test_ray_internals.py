"""Private names of Ray: what the installed release has by each, and that they stand in one place."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks import ray_internals as of_the_benchmarks
from d2f_core import ray_internals
from d2f_core.ray_internals import PrivateName, RayReleaseError
from tests import ray_internals as of_the_tests

ROOT = Path(__file__).parents[1]
NAMES = [*ray_internals.NAMES, *of_the_benchmarks.NAMES, *of_the_tests.NAMES]
PRIVATE = re.compile(
    r"\bray(\.\w+)*\._[a-z]\w*|from ray[\w.]* import _|autoscaler\.v2|executor\._|custom_execution_callback_classes"
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.name)
def test_ray_has_the_private_name_as_it_was_tried(name: PrivateName) -> None:
    ray_internals.check(name)


@pytest.mark.parametrize(("variable", "module"), of_the_tests.VARIABLES.items())
def test_ray_reads_the_environment_variable(variable: str, module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin and variable in Path(spec.origin).read_text(), f"see tests.ray_internals: {variable}"


def test_only_the_releases_that_were_tried_are_installed() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = [Requirement(line) for line in wanted if line.startswith("ray[")]
    tried = Version(ray_internals.TESTED)
    assert tried in ray.specifier
    assert Version(f"{tried.major}.{tried.minor + 1}.0") not in ray.specifier


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (PrivateName(module="ray._private.gone", name="at", use="x"), "gone.at is missing"),
        (PrivateName(module="ray._private.state", name="gone", use="x"), "state.gone is missing"),
        (PrivateName(module="ray._common.constants", name="NODE_ID_PREFIX", value="n", use="x"), "is 'node:', not 'n'"),
        (PrivateName(module="ray._private.services", name="resolve_ip_for_localhost", parameters=(), use="x"),
         r"takes \('host',\), not \(\)"),
        (PrivateName(module="ray._private.parameter", name="RayParams", attributes=("gone",), use="x"), "has no gone"),
    ],
)  # fmt: skip
def test_a_name_that_another_release_changed_is_told_in_a_sentence(name: PrivateName, what: str) -> None:
    with pytest.raises(RayReleaseError, match=rf"^Ray [\d.]+: .*{what}.* needed to x, .* tried with Ray .*: install"):
        ray_internals.check(name)


def test_private_names_of_ray_stand_in_one_file_only() -> None:
    """Beside the tests' own, and what names a member of this project."""
    places = [file for part in ("d2f_core", "pipelines", "infra", "benchmarks", "tests") for file in
              (ROOT / part).rglob("*.py") if not file.name.endswith("ray_internals.py")]  # fmt: skip
    found = [f"{file.relative_to(ROOT)}:{number}: {line}" for file in places
             for number, line in enumerate(file.read_text().splitlines(), 1) if PRIVATE.search(line)]  # fmt: skip
    assert len(places) > 200 and not found, "\n".join(found)
