r"""Embed images by teachers, for the distillation of a student.

    python -m pipelines.embed_images views
    python -m pipelines.embed_images distilldift --source.uri s3://photos/2019 --output s3://d2f/features/photos

The same command resumes a killed job, and does nothing once the table is complete.
"""

from d2f_core.correspondence.embed.config import EmbedConfig, TeacherConfig
from d2f_core.data.sources.config import ImageSource
from pipelines.cli import run_job
from pipelines.cluster import connect

DINO_S = "s3://d2f/models/dinov2-s"
LITE0 = TeacherConfig(name="lite0", kind="efficientnet-lite0", size=320, normalisation="efficientnet-lite")
DINO = TeacherConfig(name="dino", uri=DINO_S, size=224, layers=11)
SDXL_TURBO = TeacherConfig(
    name="sdxl_turbo", kind="diffusion", uri="/models/sdxl-turbo", size=980, normalisation="half",
    block="up_blocks.0.attentions.0", timesteps=(51, 101, 151, 201), prompt="category", dtype="bfloat16",
)  # fmt: skip
DINO_B = TeacherConfig(name="dino", uri="/models/dinov2-with-registers-base", size=434, normalisation="none")

EMBED_IMAGES = {
    "views": EmbedConfig(
        source=ImageSource(uri="s3://d2f/datasets/views"), split="train", output="s3://d2f/features/views",
        teachers=(LITE0, DINO), size=168, num_actors=2,
    ),
    "distilldift": EmbedConfig(
        source=ImageSource(uri="s3://BUCKET/images"), output="s3://BUCKET/features",
        teachers=(SDXL_TURBO, DINO_B), size=434, num_actors=8, gpus_per_actor=1, num_readers=16,
    ),
}  # fmt: skip


def check(config: EmbedConfig) -> None:
    from d2f_core.correspondence.embed.check import check_embed

    check_embed(config)


def main(config: EmbedConfig) -> None:
    from d2f_core.batch.table_job import make_table
    from d2f_core.correspondence.embed.check import check_embed

    job = check_embed(config)
    teachers = {f"teachers.{each.name}.uri": each.uri for each in config.teachers if each.uri}
    connect(reads={"source.uri": config.source.uri, **teachers}, writes={"output": config.output})
    make_table(job)


if __name__ == "__main__":
    run_job("embed_images", EMBED_IMAGES, main, check)
