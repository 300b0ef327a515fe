"""Registers a finished training's model as a version with a card, and moves aliases."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_core import tracking
from d2f_core.flow.publish.config import PromoteConfig, RegisterConfig
from d2f_core.flow.publish.model_card import write_card
from d2f_core.model.artifact import DESCRIPTION, read_description
from d2f_core.model.base import described_copy, local_copy
from d2f_core.registration import RegisterError
from d2f_core.storage import exists, join
from d2f_core.tracking import Loader, ModelVersionInfo, RunHandle, check_tracking
from d2f_core.tracking.publish import publish, training_run
from d2f_core.tracking.pyfunc_files import grey_png

MODEL = "model"
"""Directory in a training's output to which it exports its model, the description last."""
MODEL_TYPE = "diff2flow"
REQUIREMENTS = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "numpy", "pandas",
    "pillow", "pyarrow", "s3fs", "torchdiffeq", "dacite", "pyyaml", "psutil",
)  # fmt: skip
"""pip requirements of a model: all that its loader imports but this project, which is on no package index."""
SETTINGS = {"base_model": "", "device": ""}


@dataclass(frozen=True, kw_only=True)
class RegisterJob:
    """A registration that was checked, and is ready to run."""

    config: RegisterConfig
    description: Mapping[str, Any]
    """The model's `diff2flow.json`."""
    run: RunHandle
    """Of the training."""


def check_register(config: RegisterConfig) -> RegisterJob:
    """Look for the model and its training's run.

    Raises:
        ValueError: there is no exported model or no MLflow run of the training, or MLflow cannot be used.
    """
    if not config.run:
        raise RegisterError("run is empty. Give --run URI, the output of a training.")
    check_tracking()
    run = training_run(config.run, config.experiment)
    description = read_description(described_copy(exported_model(config)).path)
    return RegisterJob(config=config, description=description, run=run)


def register(job: RegisterJob) -> ModelVersionInfo:
    """Upload, register and alias the model; repeated with the same content it changes nothing."""
    config, description = job.config, job.description
    return publish(
        local_copy(exported_model(config)),
        job.run,
        run=config.run,
        name=config.name,
        alias=config.alias,
        training=description["training"],
        card=lambda record: write_card(description, record, f"models:/{config.name}@{config.alias}"),
        loader=loader_of(description["task"]),
        model_type=MODEL_TYPE,
    )


def loader_of(task: str) -> Loader:
    """The loader with which MLflow's own tools load a model of a task."""
    if task == "image_to_depth":
        return Loader(
            script=Path(__file__).with_name("depth_pyfunc.py"),
            inputs={"image": "binary"},
            # Named as in mlflow.diffusers, where it has a name.
            optional={
                "num_inference_steps": "long", "seed": "long", "ensemble": "long", "solver": "string",
                "shift": "double",
            },
            outputs={"depth": "binary", "depth_png": "binary", "uncertainty": "binary"},
            example={"image": grey_png(), "num_inference_steps": 2},
            settings=SETTINGS,
            requirements=(*REQUIREMENTS, "matplotlib"),
        )  # fmt: skip
    return Loader(
        script=Path(__file__).with_name("image_pyfunc.py"),
        inputs={"prompt": "string"},
        # Named as in mlflow.diffusers; the last three are this project's own.
        optional={
            "negative_prompt": "string", "num_inference_steps": "long", "guidance_scale": "double", "height": "long",
            "width": "long", "seed": "long", "solver": "string", "shift": "double",
        },
        outputs={"image": "binary"},
        example={"prompt": "red apple", "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 0},
        settings=SETTINGS,
        requirements=REQUIREMENTS,
    )  # fmt: skip


def exported_model(config: RegisterConfig) -> str:
    """The model directory to register. Raises RegisterError when it does not exist."""
    uri = config.model or join(config.run, MODEL)
    if not exists(join(uri, DESCRIPTION)):
        raise RegisterError(
            f"{uri!r} holds no exported model (it has no {DESCRIPTION}). Run "
            "pipelines.finetune to its end first, or give --model URI."
        )
    return uri


def check_move_alias(config: PromoteConfig) -> None:
    """Look for the version that the alias is to name.

    Raises:
        ValueError: neither a version nor rollback is given, the version does not exist or is incomplete, there is no
            previous version, or the lease cannot be kept where it belongs.
    """
    check_tracking()
    if config.rollback:
        tracking.earlier_version(config.name, config.alias)
    else:
        _check_version_given(config)
        tracking.complete_version(config.name, config.version)
    tracking.check_leases(config.name, leases=config.leases)


def _check_version_given(config: PromoteConfig) -> None:
    if not config.version:
        raise RegisterError("version is empty. Give --version N, or --rollback.")


def move_alias(config: PromoteConfig) -> ModelVersionInfo:
    """Promote a version, also one that was rolled back from, or go back to the one before.

    Raises:
        ValueError: as `check_move_alias`; or another job holds the lease for too long.
    """
    check_tracking()
    if config.rollback:
        return tracking.rollback(config.name, config.alias, leases=config.leases)
    _check_version_given(config)
    return tracking.promote(config.name, config.version, config.alias, leases=config.leases)
