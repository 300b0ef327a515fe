"""What counts as a refusal, which ends a job with one line, and what as a fault, which shows its traceback."""

import pytest

from d2f_core.batch.refusals import PROBLEM, RefusedError, checked, guarded, refusal
from d2f_core.batch.table_spec import TableJobError


class ScanError(TableJobError):
    """Another system's own kind of refusal."""


class Scanner:
    def __call__(self, batch: dict) -> dict:
        raise ScanError(f"scan {batch['item']} is no scan")


def test_a_subclass_in_another_package_is_a_refusal() -> None:
    assert not ScanError.__module__.startswith("d2f_core")
    assert refusal(ScanError("bad weights")) == "bad weights"
    (problem,) = guarded(Scanner)()({"item": 7})[PROBLEM]
    with pytest.raises(RefusedError, match="scan 7 is no scan"):
        checked({PROBLEM: problem})


@pytest.mark.parametrize("error", [ValueError("NumPy's"), KeyError("a key"), RuntimeError("a fault")])
def test_other_errors_are_faults(error: Exception) -> None:
    assert refusal(error) is None
