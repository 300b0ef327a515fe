"""What MLflow gets of a registered model opens elsewhere, and says what to install where it does not."""

import ast
import functools
import importlib.metadata
import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import d2f_core.correspondence.publish.job as matchers
import d2f_core.flow.publish.job as flows
from d2f_core.tracking.pyfunc_files import Loader, write_pyfunc

LOADERS = {
    "image": flows.loader_of("text_to_image"),
    "depth": flows.loader_of("image_to_depth"),
    "matcher": matchers.loader(),
}
FIRST = {
    "image": "d2f_core.flow.generate.sampler",
    "depth": "d2f_core.data.images",
    "matcher": "d2f_core.correspondence.artifact",
}
"""The first module of this project that each script imports."""


@pytest.mark.parametrize("kind", LOADERS)
def test_nothing_in_mlflows_files_names_a_place_of_this_machine(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "version"
    write_pyfunc(target, LOADERS[kind], {"README.md": b"x"}, model_bytes=1, run_id="0" * 32, model_id="m-1")
    described = yaml.safe_load((target / "MLmodel").read_text())["flavors"]["python_function"]
    assert described["model_code_path"] == LOADERS[kind].script.name
    assert described["artifacts"] == {"model": {"path": "artifacts/model", "uri": "artifacts/model"}}
    texts = [file.read_text() for file in target.rglob("*") if file.is_file()]
    assert not [text for text in texts if re.search(r"/(tmp|home|root|var|Users)/", text) or str(Path.cwd()) in text]
    requirements = (target / "requirements.txt").read_text().splitlines()
    assert next(line for line in requirements if not line.startswith("#")).startswith("mlflow==")
    assert requirements[0].startswith("# And diff2flow-ray==") and "pip install --no-deps" in requirements[1]


@pytest.mark.parametrize("kind", LOADERS)
def test_without_this_project_a_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, FIRST[kind], None)
    with pytest.raises(ImportError, match=r"the package diff2flow-ray, .* requirements\.txt .* --no-deps DIRECTORY"):
        runpy.run_path(str(LOADERS[kind].script))


@pytest.mark.parametrize("kind", LOADERS)
def test_the_requirements_hold_all_that_a_loader_imports(kind: str) -> None:
    imported = {name for name in _imports(LOADERS[kind].script) if name not in sys.stdlib_module_names}
    assert {"torch", "mlflow", "pandas"} <= imported, "the search finds something"
    brought = _with_dependencies(LOADERS[kind])
    assert not {name for name in imported if not {*map(canonicalize_name, _by_module()[name])} & brought}


def _imports(script: Path) -> set[str]:
    """Packages that importing a file imports, in the modules of this project that it imports too."""
    left, seen, found = [script], {script}, set[str]()
    while left:
        for module in _at_import(ast.parse(left.pop().read_text())):
            package = module.partition(".")[0]
            if package != "d2f_core":
                found.add(package)
            elif (file := _file(module)) and file not in seen:
                seen.add(file)
                left.append(file)
    return found


def _at_import(node: ast.AST) -> Iterator[str]:
    """The modules that a module imports as soon as it is imported itself: outside functions and `TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield str(child.module)
            yield from (f"{child.module}.{alias.name}" for alias in child.names if child.module == "d2f_core")
        elif not isinstance(child, ast.FunctionDef) and "TYPE_CHECKING" not in ast.dump(getattr(child, "test", child)):
            yield from _at_import(child)


def _file(module: str) -> Path | None:
    found = importlib.util.find_spec(module)
    return Path(found.origin) if found and found.origin else None


def _with_dependencies(loader: Loader) -> set[str]:
    """The distributions that pip installs for a loader's requirements, and MLflow's."""
    left, found = {*map(canonicalize_name, loader.requirements), "mlflow"}, set[str]()
    while left:
        found.add(name := left.pop())
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        wanted = {
            canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})
        }
        left |= wanted & _installed() - found
    return found


@functools.cache
def _installed() -> set[str]:
    return {canonicalize_name(name) for names in _by_module().values() for name in names}


@functools.cache
def _by_module() -> Mapping[str, list[str]]:
    """Package that is imported -> the distributions that it comes with."""
    return importlib.metadata.packages_distributions()
