"""Render views of procedural objects, with exact depth and keypoints, as a table for semantic correspondence.

python -m pipelines.make_views views                                  # 2,048 views of 256 objects at 160 px
python -m pipelines.make_views views --output /data/views --size 224
python -m pipelines.make_views views-few                              # 48 views, to look at
"""

import logging

from d2f_core.correspondence.views.config import MakeViewsConfig
from pipelines.cli import run_job
from pipelines.cluster import connect

MAKE_VIEWS = {
    "views": MakeViewsConfig(output="s3://d2f/datasets/views"),
    "views-few": MakeViewsConfig(
        output="s3://d2f/datasets/views-few", train_meshes=1, val_meshes=1, test_meshes=1, views_per_mesh=2
    ),
}

logger = logging.getLogger(__name__)


def check(config: MakeViewsConfig) -> None:
    from d2f_core.correspondence.views.table import view_inputs
    from d2f_core.storage import check_reachable

    view_inputs(config)
    check_reachable(config.output, write=True)


def main(config: MakeViewsConfig) -> None:
    from d2f_core.correspondence.views.table import make_views

    check(config)
    connect(reads={}, writes={"output": config.output})
    manifest, written = make_views(config)
    logger.info("%s: %d views, %s", config.output, manifest.num_rows, "written" if written else "complete already")


if __name__ == "__main__":
    run_job("make_views", MAKE_VIEWS, main, check)
