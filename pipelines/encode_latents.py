r"""Encode captioned images into a latent table.

    python -m pipelines.encode_latents twemoji
    python -m pipelines.encode_latents twemoji --source.uri s3://photos/2019 --base /models/sd15 --resolution 512 \
        --output s3://d2f/latents/photos

The same command resumes a killed job, and does nothing once the table is complete. When the source has changed, it
encodes what is new, and the table gets a further version.
"""

from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.encode.config import EncodeConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import EMOJI_SD
from pipelines.recipes_stable_diffusion import ENCODE_STABLE_DIFFUSION

ENCODE_LATENTS = {
    style: EncodeConfig(
        source=ImageSource(uri=f"s3://d2f/datasets/{style}"), base=EMOJI_SD, output=f"s3://d2f/latents/{style}"
    )
    for style in ("twemoji", "openmoji", "openmoji-starter", "openmoji-few", "openmoji-train")
} | ENCODE_STABLE_DIFFUSION


def check(config: EncodeConfig) -> None:
    from d2f_core.flow.encode.check import check_encode

    check_encode(config)


def main(config: EncodeConfig) -> None:
    from d2f_core.batch.table_job import make_table
    from d2f_core.flow.encode.check import check_encode

    job = check_encode(config)
    connect(reads={"source.uri": config.source.uri, "base": config.base}, writes={"output": config.output})
    make_table(job)


if __name__ == "__main__":
    run_job("encode_latents", ENCODE_LATENTS, main, check)
