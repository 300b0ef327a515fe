r"""Make image tables of your own captioned images, and a page that shows what came in.

    python -m pipelines.import_images images --source.uri s3://photos/2019 --output s3://d2f/datasets/photos
    python -m pipelines.import_images images --source.uri /data/photos --output /data/tables --resolution 512

OUTPUT/train and OUTPUT/test can be encoded, trained on and evaluated with; open OUTPUT/report.html before you do. The
same command resumes a killed job, and does nothing once it is complete.
"""

from d2f_core.import_images.config import ImportImagesConfig
from pipelines.cli import run_job
from pipelines.cluster import connect

IMPORT_IMAGES = {"images": ImportImagesConfig()}


def check(config: ImportImagesConfig) -> None:
    from d2f_core.import_images.job import check_import

    check_import(config)


def main(config: ImportImagesConfig) -> None:
    from d2f_core.import_images.job import check_import, import_images

    job = check_import(config)
    connect(reads={"source.uri": config.source.uri}, writes={"output": config.output})
    import_images(job)


if __name__ == "__main__":
    run_job("import_images", IMPORT_IMAGES, main, check)
