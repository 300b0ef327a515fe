"""What importing the package does to a process, and in which order its modules can be read."""

import graphlib
import subprocess
import sys

import grimp
import pytest


@pytest.mark.parametrize(("before", "after"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_garbage_is_looked_for_less_often_unless_the_program_chose_otherwise(before: int, after: int):
    code = f"import gc; gc.set_threshold({before}); import d2f_core; print(gc.get_threshold()[0])"
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)) == after


def test_no_module_needs_one_that_needs_it():
    """Imports inside functions and those that only the type checker follows count too."""
    graph = grimp.build_graph("d2f_core", "pipelines", "infra", cache_dir=None)
    needs = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(needs) > 150
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle
