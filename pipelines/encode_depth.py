r"""Encode images with depth into a depth latent table.

    python -m pipelines.encode_depth depth
    python -m pipelines.encode_depth sd21-depth --source.uri s3://data/hypersim --source.distances radial \
        --base s3://models/sd21 --output s3://d2f/latents/hypersim

The same command resumes a killed job, and does nothing once the table is complete.
"""

from d2f_core.data.sources.config import DepthSource
from d2f_core.flow.encode.config import EncodeDepthConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import DEPTH_BASE
from pipelines.recipes_stable_diffusion import ENCODE_DEPTH_STABLE_DIFFUSION

ENCODE_DEPTH = {
    name: EncodeDepthConfig(
        source=DepthSource(uri=f"s3://d2f/datasets/{name}"), base=DEPTH_BASE, output=f"s3://d2f/latents/{name}"
    )
    for name in ("depth", "depth-test")
} | ENCODE_DEPTH_STABLE_DIFFUSION


def check(config: EncodeDepthConfig) -> None:
    from d2f_core.flow.encode.check import check_encode_depth

    check_encode_depth(config)


def main(config: EncodeDepthConfig) -> None:
    from d2f_core.batch.table_job import make_table
    from d2f_core.flow.encode.check import check_encode_depth

    job = check_encode_depth(config)
    connect(reads={"source.uri": config.source.uri, "base": config.base}, writes={"output": config.output})
    make_table(job)


if __name__ == "__main__":
    run_job("encode_depth", ENCODE_DEPTH, main, check)
