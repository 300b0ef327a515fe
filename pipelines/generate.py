r"""Turn a prompt file into images and an index table.

    python -m pipelines.generate flow --prompts s3://d2f/prompts.jsonl --output s3://d2f/generations/flow
    python -m pipelines.generate base --prompts prompts.csv --output /data/base --model /models/sd15 --steps 25 50

The same command resumes a killed job, and does nothing once all images exist.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from d2f_core.flow.generate.config import GenerateConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import EMOJI_SD, FLOW_MODEL
from pipelines.recipes_stable_diffusion import PAIRS_STABLE_DIFFUSION

if TYPE_CHECKING:
    from d2f_core.data.manifest import Manifest

GENERATE = {
    "flow": GenerateConfig(
        model=f"models:/{FLOW_MODEL}@candidate", prompts="s3://d2f/prompts.jsonl", output="s3://d2f/generations/flow"
    ),
    "base": GenerateConfig(model=EMOJI_SD, prompts="s3://d2f/prompts.jsonl", output="s3://d2f/generations/base"),
} | PAIRS_STABLE_DIFFUSION


def check(config: GenerateConfig) -> None:
    from d2f_core.flow.generate.job import check_generate

    check_generate(config)


def main(config: GenerateConfig) -> "Manifest":
    return run_all([config])[0]


def run_all(configs: Sequence[GenerateConfig]) -> "list[Manifest]":
    """Run several generations with one pool of actors, so that libraries are loaded only once."""
    from d2f_core.flow.generate.job import check_generate, generate_all

    jobs = [check_generate(config) for config in configs]
    for config in configs:
        connect(reads={"model": config.model}, writes={"output": config.output})
    return generate_all(jobs)


if __name__ == "__main__":
    run_job("generate", GENERATE, main, check)
