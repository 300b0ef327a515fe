"""A finished training's model becomes a version in the registry, with a model card made from its description."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2f_core.model.artifact import DESCRIPTION, read_description
from d2f_core.model.base import local_copy
from d2f_core.storage import exists, join
from d2f_core.tracking import ModelVersionInfo, check_tracking, find_run, register_model

MODEL = "model"
"""A training exports its model to `OUTPUT/model/`, the description last."""


class RegisterError(ValueError):
    """A model that cannot be registered, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    run: str = ""
    """Output URI of the training, which is also the key of its MLflow run."""
    model: str = ""
    """Model directory; empty: the one that the training exported."""
    name: str = "emoji-flow"
    """Registered model; each call adds a version, unless the same content is there."""
    alias: str = "candidate"
    """Alias that moves to this version."""
    experiment: str = "diff2flow"
    """MLflow experiment of the training's run."""

    def __post_init__(self) -> None:
        if not self.name or any(character in self.name for character in "/@:'"):
            raise RegisterError(f"name={self.name!r} must not be empty or hold any of / @ : '. Choose another.")
        if not self.alias:
            raise RegisterError("alias is empty. Use 'candidate'.")


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
    return register_model(
        handle,
        model_dir=directory,
        name=config.name,
        alias=config.alias,
        tags=model_tags(description),
        description=model_card(config, description),
    )


def exported_model(config: RegisterConfig) -> str:
    """The directory that is to be registered. Raises RegisterError when there is none."""
    uri = config.model or join(config.run, MODEL)
    if not exists(join(uri, DESCRIPTION)):
        raise RegisterError(
            f"{uri!r} holds no exported model (it has no {DESCRIPTION}). Run "
            "pipelines.finetune to its end first, or give --model URI."
        )
    return uri


def model_tags(description: Mapping[str, Any]) -> dict[str, str]:
    """What a browser of the registry filters by."""
    schedule = description["schedule"]
    return {
        "base_uri": description["base"]["uri"],
        "base_sha256": description["base"]["sha256"],
        "objective": description["objective"],
        "method": description["method"],
        "prediction_type": description["prediction_type"],
        "schedule": f"{schedule.get('beta_schedule')} {schedule.get('beta_start')} to {schedule.get('beta_end')}",
        **{name: str(value) for name, value in description["sampling"].items()},
    }


def model_card(config: RegisterConfig, description: Mapping[str, Any]) -> str:
    """Markdown for the version's page."""
    rows = {**model_tags(description), **description["training"]}
    table = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows.items())
    command = (
        f"python -m pipelines.generate flow --model models:/{config.name}@{config.alias} --prompts FILE --output URI"
    )
    return (
        f"A {description['objective']} model on the base `{description['base']['uri']}`, trained at `{config.run}`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"Sample it:\n\n```\n{command}\n```\n\n"
        f"Time convention: {description['time_convention']}. Scheduler config of the base:\n\n"
        f"```json\n{json.dumps(description['schedule'], sort_keys=True)}\n```\n"
    )
