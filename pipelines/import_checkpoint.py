r"""Make a base model of a checkpoint: one file, a directory or a hub id, with another autoencoder, with LoRAs merged.

    python -m pipelines.import_checkpoint checkpoint --source mine.safetensors --output s3://d2f/models/mine
    python -m pipelines.import_checkpoint checkpoint --source owner/name@revision --output /data/models/theirs \
        --vae better.safetensors --lora style.safetensors:0.8 other.safetensors

What is written is checked as every base is, and its network is asked what it predicts. The same command does nothing
once the model is there.
"""

import logging

from d2f_core.model.importing.config import ImportCheckpointConfig
from pipelines.cli import run_job

logger = logging.getLogger(__name__)

IMPORT_CHECKPOINT = {"checkpoint": ImportCheckpointConfig()}


def check(config: ImportCheckpointConfig) -> None:
    from d2f_core.model.importing.job import check_checkpoint_import

    check_checkpoint_import(config)


def main(config: ImportCheckpointConfig) -> None:
    from d2f_core.model.importing.job import import_checkpoint

    done = import_checkpoint(config)
    state = "complete before" if done.was_there else "written"
    logger.info("%s: %s; %s, content hash %s", done.output, state, done.prediction, done.content_hash[:12])


if __name__ == "__main__":
    run_job("import_checkpoint", IMPORT_CHECKPOINT, main, check)
