r"""Turn a prompt file into images and an index table.

    python -m pipelines.generate flow --prompts s3://d2f/prompts.jsonl --output s3://d2f/generations/flow
    python -m pipelines.generate base --prompts prompts.csv --output /data/base --model /models/sd15 --steps 25 50

The same command again goes on where a killed job was, and does nothing once all images are there.
"""

from collections.abc import Sequence

import ray

from d2f_core.data.manifest import Manifest
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate, generate_all
from pipelines.cli import run_job
from pipelines.names import EMOJI_SD, FLOW_MODEL
from pipelines.recipes_stable_diffusion import PAIRS_STABLE_DIFFUSION

GENERATE = {
    "flow": GenerateConfig(
        model=f"models:/{FLOW_MODEL}@candidate", prompts="s3://d2f/prompts.jsonl", output="s3://d2f/generations/flow"
    ),
    "base": GenerateConfig(model=EMOJI_SD, prompts="s3://d2f/prompts.jsonl", output="s3://d2f/generations/base"),
} | PAIRS_STABLE_DIFFUSION


def main(config: GenerateConfig) -> Manifest:
    return run_all([config])[0]


def run_all(configs: Sequence[GenerateConfig]) -> list[Manifest]:
    """Several generations by one pool of actors, which load their libraries once for all."""
    jobs = [check_generate(config) for config in configs]
    ray.init(ignore_reinit_error=True)
    return generate_all(jobs)


if __name__ == "__main__":
    run_job("generate", GENERATE, main, check_generate)
