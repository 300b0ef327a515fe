r"""Encode captioned images into a latent table.

    python -m pipelines.encode_latents twemoji
    python -m pipelines.encode_latents twemoji --source.uri s3://photos/2019 --base /models/sd15 --resolution 512 \
        --output s3://d2f/latents/photos

The same command again goes on where a killed job was, and does nothing once the table is complete.
"""

import ray

from d2f_core.inference.encode import EncodeConfig, check_encode, encode_latents
from pipelines.cli import run_job


def main(config: EncodeConfig) -> None:
    check_encode(config)
    ray.init(ignore_reinit_error=True)
    encode_latents(config)


if __name__ == "__main__":
    from pipelines.recipes import ENCODE_LATENTS

    run_job("encode_latents", ENCODE_LATENTS, main, check_encode)
