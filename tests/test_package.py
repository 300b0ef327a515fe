"""What importing the package does to a process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("before", "after"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_garbage_is_looked_for_less_often_unless_the_program_chose_otherwise(before: int, after: int):
    code = f"import gc; gc.set_threshold({before}); import d2f_core; print(gc.get_threshold()[0])"
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)) == after
