"""The alias, its history and all reports stay true when promotions meet, die or lose the registry; in short."""

from pathlib import Path

from benchmarks.promotions import KINDS, PromotionsConfig, play, summary
from infra.local.stack import StackEnv


def test_each_kind_of_trouble_leaves_alias_history_and_reports_true(stack: StackEnv, tmp_path: Path) -> None:
    config = PromotionsConfig(rounds=len(KINDS), seed=1, stale=2.0)
    rows = play(config, stack.variables, tmp_path)
    assert all(row["right"] for row in rows) and {row["kind"] for row in rows} == set(KINDS), rows
    assert summary(rows, config.rounds).startswith("4 of 4 rounds right")
