"""Damaged data, and other numbers of workers."""

import pytest

from d2f_core.data.manifest import read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.train.launch import TrainingStoppedError
from pipelines.finetune import main
from tests.chaos.training import CUT_OFF, LATENTS, final, losses, make_config
from tests.slow import slow

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


@slow("150 s: two workers at stage 2 against one plain process stay, in tests/train/test_engine.py")
def test_losses_do_not_depend_on_the_number_of_workers_nor_on_the_zero_stage(base, unbroken):
    config = make_config(base, "four-workers", num_workers=4, zero_stage=3)
    main(config)
    assert losses(config) == pytest.approx(losses(unbroken), abs=1e-5)
    assert final(config.output)[0].manifest.state["consumed"] == final(unbroken.output)[0].manifest.state["consumed"]


def test_rows_that_cannot_be_read_are_left_out_and_named(unbroken):
    ledger = read_quarantine(unbroken.output)
    holdout = unbroken.plan([read_manifest(LATENTS)], ()).sources[0].order.holdout()
    assert sorted(bad.source_uri for bad in ledger) == [f"{LATENTS}#{row}" for row in CUT_OFF if row not in holdout]
    assert all("part-1.parquet" in bad.reason for bad in ledger)
    assert final(unbroken.output)[0].manifest.step == unbroken.train.num_steps


@slow("a minute: the limit by itself stays, in tests/train/test_quarantine.py")
def test_more_unusable_rows_than_allowed_end_the_training_at_once(base):
    with pytest.raises(
        TrainingStoppedError, match=r"rows are unusable, more than max_quarantined_share=0\.01 .*part-1"
    ):
        main(make_config(base, "too-many", max_quarantined_share=0.01))
