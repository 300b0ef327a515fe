r"""Memory per GPU, hours and storage of a finetuning, before anything is started; needs no weights and no cluster.

    python -m pipelines.estimate sd15-lora
    python -m pipelines.estimate sd21-512 --train.num-workers 4 --train.micro-batch-size 8 --gpu a10g
    python -m pipelines.estimate sd15 --architecture s3://models/my-sd15 --train.activation-checkpointing

The recipes are those of `pipelines.finetune`, and take the same flags for `model` and `train`.
"""

from d2f_core.flow.estimate.config import EstimateConfig
from pipelines.cli import run_job


def main(config: EstimateConfig) -> None:
    from d2f_core.flow.estimate.job import estimate, report

    print(report(config, estimate(config)))


if __name__ == "__main__":
    from pipelines.recipes_stable_diffusion import ESTIMATE

    run_job("estimate", ESTIMATE, main)
