"""Unusable rows are counted once, and end the training beyond their limit; with workers and a table in tests/chaos."""

from pathlib import Path

import pytest
import torch.distributed as dist

from d2f_core.train.quarantine import QuarantineLimitError, TrainingQuarantine


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_row_counts_once_and_the_limit_names_the_first_reasons(group):
    quarantine = TrainingQuarantine({7: "old"}, num_rows=200, max_share=0.01)
    quarantine.add(((7, "met again"),))
    assert quarantine.exchange("cpu") == 1
    quarantine.add(((3, "truncated: part-1.parquet"),))
    assert quarantine.exchange("cpu") == 2, "1 % of 200"
    assert quarantine.rows() == [(3, "truncated: part-1.parquet"), (7, "old")]
    quarantine.add(((9, "NaN"),))
    message = (
        r"3 of 200 rows are unusable, more than max_quarantined_share=0.01 allows \(row 3: truncated.*raise the limit"
    )
    with pytest.raises(QuarantineLimitError, match=message):
        quarantine.exchange("cpu")
