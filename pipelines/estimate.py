r"""Memory per GPU, hours and storage of a training, before anything is started; needs no weights and no cluster.

    python -m pipelines.estimate sd15-lora
    python -m pipelines.estimate sd21-512 --train.num-workers 4 --train.micro-batch-size 8 --gpu a10g
    python -m pipelines.estimate sd15 --architecture s3://models/my-sd15 --train.activation-checkpointing
    python -m pipelines.estimate distilldift --images 53340 --train.num-workers 4

The recipes are those of `pipelines.finetune` and `pipelines.distill` for real weights, and take the same flags.
"""

from d2f_core.correspondence.estimate.config import EstimateDistillConfig
from d2f_core.flow.estimate.config import EstimateConfig
from pipelines.cli import run_job


def main(config: EstimateConfig | EstimateDistillConfig) -> None:
    if isinstance(config, EstimateDistillConfig):
        from d2f_core.correspondence.estimate import job

        print(job.report(config, job.estimate(config)))
        return
    from d2f_core.flow.estimate.job import estimate, report

    print(report(config, estimate(config)))


if __name__ == "__main__":
    from pipelines.distill import ESTIMATE_DISTILL
    from pipelines.recipes_stable_diffusion import ESTIMATE

    run_job("estimate", {**ESTIMATE, **ESTIMATE_DISTILL}, main)
