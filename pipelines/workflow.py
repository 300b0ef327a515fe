"""All stages in one Ray job: `ray job submit --working-dir . -- python -m pipelines.workflow quickstart`.

make_dataset -> encode_latents -> finetune -> register -> generate -> contact_sheet, as pipelines/text_to_image.py
describes; or `photos`, `depth`, `reflow` and `distill`: pipelines/photos.py, depth.py, reflow.py and distillation.py. A
stage whose output is complete for the same config and inputs is skipped; after a kill, the same command resumes.
"""

from pipelines.cli import run_job
from pipelines.photos_config import PhotosConfig
from pipelines.workflow_config import DepthConfig, DistillWorkflowConfig, ReflowConfig, WorkflowConfig

Config = WorkflowConfig | PhotosConfig | ReflowConfig | DepthConfig | DistillWorkflowConfig


def check(config: Config) -> None:
    """Check what can be checked before the first stage runs; raises ValueError for an unusable setting."""
    if isinstance(config, ReflowConfig):
        from pipelines import reflow

        reflow.check(config)
    elif isinstance(config, DepthConfig):
        from pipelines import depth

        depth.check(config)
    elif isinstance(config, DistillWorkflowConfig):
        from pipelines import distillation

        distillation.check(config)
    elif isinstance(config, PhotosConfig):
        from pipelines import photos

        photos.check(config)
    else:
        from pipelines import text_to_image

        text_to_image.check(config)


def main(config: Config) -> None:
    if isinstance(config, ReflowConfig):
        from pipelines import reflow

        reflow.main(config)
    elif isinstance(config, DepthConfig):
        from pipelines import depth

        depth.main(config)
    elif isinstance(config, DistillWorkflowConfig):
        from pipelines import distillation

        distillation.main(config)
    elif isinstance(config, PhotosConfig):
        from pipelines import photos

        photos.main(config)
    else:
        from pipelines import text_to_image

        text_to_image.main(config)


if __name__ == "__main__":
    from pipelines.workflow_recipes import DEPTH, DISTILLATION, PHOTOS, REFLOW, WORKFLOW

    run_job("workflow", {**WORKFLOW, **PHOTOS, "reflow": REFLOW, "depth": DEPTH, "distill": DISTILLATION}, main, check)
