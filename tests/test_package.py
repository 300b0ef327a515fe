"""What importing the package does to a process, and in which order its modules can be read."""

import graphlib
import subprocess
import sys
from pathlib import Path

import grimp
import pytest


@pytest.mark.parametrize(("before", "after"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_garbage_is_looked_for_less_often_unless_the_program_chose_otherwise(before: int, after: int):
    code = f"import gc; gc.set_threshold({before}); import d2f_core; print(gc.get_threshold()[0])"
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)) == after


JOBS = sorted(file.stem for file in Path("pipelines").glob("*.py") if "__main__" in file.read_text())
HELP = """
import contextlib, io, runpy, sys
for job in sys.argv[1:]:
    sys.argv, told = [job, "--help"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(told):
        runpy.run_module(f"pipelines.{job}", run_name="__main__")
    heavy = {"torch", "ray", "diffusers", "transformers", "mlflow", "deepspeed", "numpy", "pyarrow", "fsspec"}
    print(job, f"usage: python -m pipelines.{job}" in told.getvalue(), *heavy & sys.modules.keys())
"""


def test_every_job_tells_its_flags_without_the_libraries_that_it_runs_by():
    """They take seconds to import; configs, which all that `--help` and a misspelt flag ask for, need none of them."""
    told = subprocess.check_output([sys.executable, "-W", "ignore", "-c", HELP, *JOBS], text=True, timeout=60)
    assert len(JOBS) > 10 and told.splitlines() == [f"{job} True" for job in JOBS]


def test_no_module_needs_one_that_needs_it():
    """Imports inside functions and those that only the type checker follows count too."""
    graph = grimp.build_graph("d2f_core", "pipelines", "infra", cache_dir=None)
    needs = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(needs) > 150
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(("job", "most"), [("register", 60), ("contact_sheet", 45), ("generate", 105)])
def test_a_job_reaches_few_modules(job: str, most: int):
    """Imports inside functions count too: what a job can run is what a reader has to know."""
    graph = grimp.build_graph("d2f_core", "pipelines", "infra", cache_dir=None)
    assert len(graph.find_upstream_modules(f"pipelines.{job}")) <= most
