"""A finished training's model becomes a version in the registry, with what tells what it is; aliases move."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2f_core import tracking
from d2f_core.flow.generate.sampler import encode_image
from d2f_core.flow.publish.config import PromoteConfig, RegisterConfig, RegisterError
from d2f_core.flow.publish.model_card import ModelCardData, model_card, model_tags, version_description
from d2f_core.model.artifact import DESCRIPTION, read_description
from d2f_core.model.base import local_copy
from d2f_core.storage import exists, join, read_bytes
from d2f_core.tracking import Loader, ModelVersionInfo, RunHandle, check_tracking, find_run, register_model

MODEL = "model"
"""A training exports its model to `OUTPUT/model/`, the description last."""
EVALUATION = "evaluation.json"
"""A checkpoint's metrics, inside its directory."""
DIGEST_TAG = "d2f.latents_digest"
REQUIREMENTS = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow",
)  # fmt: skip
"""Not this project itself, which no package index serves; the card says so."""
SETTINGS = {"base_model": "", "device": ""}


def register(config: RegisterConfig) -> ModelVersionInfo:
    """Upload, register and alias the model; repeated with the same content it changes nothing.

    Raises:
        ValueError: no exported model, no MLflow run of that training, or MLflow cannot be used.
    """
    if not config.run:
        raise RegisterError("run is empty. Give --run URI, the output of a training.")
    check_tracking()
    directory = local_copy(exported_model(config))
    description = read_description(directory)
    handle = find_run(experiment=config.experiment, run_key=config.run)
    if handle is None:
        raise RegisterError(
            f"MLflow has no run of {config.run!r} in the experiment {config.experiment!r}. Give the experiment that "
            "the training was logged to."
        )
    yaml, picture = tracking.run_file(handle, "config.yaml"), tracking.run_file(handle, "samples.png")
    facts = ModelCardData(
        name=config.name,
        alias=config.alias,
        run=config.run,
        run_url=handle.url,
        data_digest=tracking.run_tags(handle).get(DIGEST_TAG, ""),
        metrics=checkpoint_metrics(handle, description["training"]),
        config_yaml=(yaml or b"").decode(),
        has_samples=picture is not None,
    )
    files = {"README.md": model_card(description, facts).encode(), "config.yaml": yaml, "samples.png": picture}
    return register_model(
        handle,
        model_dir=directory,
        name=config.name,
        alias=config.alias,
        tags=model_tags(description, facts),
        description=version_description(description, facts),
        loader=loader_of(description["task"]),
        files={name: content for name, content in files.items() if content},
        step=int(description["training"].get("step", 0)),
        metrics=facts.metrics,
    )


def loader_of(task: str) -> Loader:
    """How MLflow's own tools open a model of a task."""
    if task == "image_to_depth":
        return Loader(
            script=Path(__file__).with_name("depth_pyfunc.py"),
            inputs={"image": "binary"},
            # The names of mlflow.diffusers, where it has one.
            optional={
                "num_inference_steps": "long", "seed": "long", "ensemble": "long", "solver": "string",
                "shift": "double",
            },
            outputs={"depth": "binary", "depth_png": "binary", "uncertainty": "binary"},
            example={"image": encode_image(np.full((16, 16, 3), 128, np.uint8)), "num_inference_steps": 2},
            settings=SETTINGS,
            requirements=(*REQUIREMENTS, "matplotlib"),
        )  # fmt: skip
    return Loader(
        script=Path(__file__).with_name("image_pyfunc.py"),
        inputs={"prompt": "string"},
        # As mlflow.diffusers names them; the last three are this project's.
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
    """The directory that is to be registered. Raises RegisterError when there is none."""
    uri = config.model or join(config.run, MODEL)
    if not exists(join(uri, DESCRIPTION)):
        raise RegisterError(
            f"{uri!r} holds no exported model (it has no {DESCRIPTION}). Run "
            "pipelines.finetune to its end first, or give --model URI."
        )
    return uri


def checkpoint_metrics(handle: RunHandle, training: Mapping[str, Any]) -> dict[str, float]:
    """The evaluation of the checkpoint that a model was made of; what the run logged at its step if there is none.

    Raises:
        RegisterError: the evaluation was damaged.
    """
    checkpoint = training.get("checkpoint")
    place = join(checkpoint, EVALUATION) if checkpoint else ""
    if not place or not exists(place):
        return tracking.run_metrics(handle, int(training["step"])) if "step" in training else {}
    try:
        return {name: float(value) for name, value in json.loads(read_bytes(place))["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RegisterError(f"{place} is damaged ({error}). Delete it, and resume the training.") from None


def move_alias(config: PromoteConfig) -> ModelVersionInfo:
    """Promote a version, or go back to the one before.

    Raises:
        ValueError: neither a version nor rollback, no such version, an incomplete one, or none to go back to.
    """
    check_tracking()
    if config.rollback:
        return tracking.rollback(config.name, config.alias)
    if not config.version:
        raise RegisterError("version is empty. Give --version N, or --rollback.")
    return tracking.promote(config.name, config.version, config.alias)
