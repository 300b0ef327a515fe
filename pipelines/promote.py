"""Point an alias at a version, or roll it back.

python -m pipelines.promote emoji-flow --version 3
python -m pipelines.promote emoji-flow --rollback
"""

from typing import TYPE_CHECKING

from d2f_core.flow.publish.config import PromoteConfig
from pipelines.cli import run_job
from pipelines.names import FLOW_MODEL, MATCHER

if TYPE_CHECKING:
    from d2f_core.tracking import ModelVersionInfo

RECIPES = {"emoji-flow": PromoteConfig(name=FLOW_MODEL), "matcher": PromoteConfig(name=MATCHER)}


def check(config: PromoteConfig) -> None:
    from d2f_core.flow.publish.job import check_move_alias

    check_move_alias(config)


def main(config: PromoteConfig) -> "ModelVersionInfo":
    from d2f_core.flow.publish.job import move_alias

    return move_alias(config)


if __name__ == "__main__":
    run_job("promote", RECIPES, main, check)
