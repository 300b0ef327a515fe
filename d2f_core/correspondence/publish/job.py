"""Registers a trained matcher as a version with a card, and writes its network for stock transformers."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from d2f_core import storage
from d2f_core.correspondence.artifact import DESCRIPTION, MatcherDescription, describe_matcher, load_student
from d2f_core.correspondence.publish.card import write_card
from d2f_core.correspondence.publish.config import RegisterMatcherConfig
from d2f_core.correspondence.publish.merged import merged_readme, processor_config
from d2f_core.correspondence.student import merge, save_merged
from d2f_core.model.base import local_copy
from d2f_core.registration import RegisterError
from d2f_core.tracking import Loader, ModelVersionInfo, RunHandle, check_tracking
from d2f_core.tracking.publish import publish, training_run
from d2f_core.tracking.pyfunc_files import grey_png

MODEL = "model"
"""Directory in a training's output to which it exports its matcher, the description last."""
MODEL_TYPE = "distilldift"
REQUIREMENTS = (
    "torch", "diffusers", "transformers", "peft", "safetensors", "huggingface_hub", "numpy", "pandas", "pillow",
    "pyarrow", "s3fs", "psutil", "requests",
)  # fmt: skip
"""pip requirements of a matcher: all that its loader imports but this project, which is on no package index."""


@dataclass(frozen=True, kw_only=True)
class RegisterMatcherJob:
    """A registration that was checked, and is ready to run."""

    config: RegisterMatcherConfig
    model: str
    """The matcher's directory."""
    description: MatcherDescription
    run: RunHandle
    """Of the training."""


def check_register(config: RegisterMatcherConfig) -> RegisterMatcherJob:
    """Look for the matcher and its training's run.

    Raises:
        ValueError: there is no exported matcher or no MLflow run of the training, or MLflow cannot be used.
    """
    if not config.run:
        raise RegisterError("run is empty. Give --run URI, the output of a training.")
    check_tracking()
    run = training_run(config.run, config.experiment)
    model = config.model or storage.join(config.run, MODEL)
    storage.check_reachable(model)
    if not storage.exists(storage.join(model, DESCRIPTION)):
        raise RegisterError(
            f"{model!r} holds no matcher (it has no {DESCRIPTION}). Run pipelines.distill to its end first, or give "
            "--model URI."
        )
    return RegisterMatcherJob(config=config, model=model, description=describe_matcher(model), run=run)


def register(job: RegisterMatcherJob) -> ModelVersionInfo:
    """Upload, register and alias the matcher; repeated with the same content it changes nothing."""
    config, description = job.config, job.description
    return publish(
        local_copy(job.model),
        job.run,
        run=config.run,
        name=config.name,
        alias=config.alias,
        training=description.training,
        card=lambda record: write_card(description, record, f"models:/{config.name}@{config.alias}"),
        loader=loader(),
        model_type=MODEL_TYPE,
    )


def loader() -> Loader:
    """How MLflow's own tools load a matcher; columns are called as kornia calls them."""
    return Loader(
        script=Path(__file__).with_name("matcher_pyfunc.py"),
        inputs={"image0": "binary", "image1": "binary", "keypoints0": "double[][]"},
        outputs={"keypoints1": "double[][]", "confidence": "double[]"},
        example={"image0": grey_png(), "image1": grey_png(), "keypoints0": [[8.0, 8.0], [4.5, 12.5]]},
        settings={"base_model": "", "device": ""},
        requirements=REQUIREMENTS,
    )


def export_transformers(model: str, output: str, *, base_uri: str | None = None) -> str:
    """Write a matcher's network with its adapters merged, as a directory that `AutoModel.from_pretrained` opens.

    Args:
        model: a matcher's directory, or models:/NAME@ALIAS.
        output: the directory, s3:// or local.
        base_uri: where its base is now; None: as recorded.

    Raises:
        ValueError: there is no matcher, or its base is another than it was trained on.
    """
    student, description = load_student(model, base_uri=base_uri)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "merged")
        save_merged(merge(student), directory)
        if processor := processor_config(description.preparation):
            (directory / "preprocessor_config.json").write_text(processor)
        (directory / "README.md").write_text(merged_readme(description))
        storage.upload_tree(directory, output, last="config.json")
    return output
