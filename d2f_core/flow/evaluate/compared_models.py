"""The models of an evaluation: how each generates its images, and the loss that its training measured."""

import logging
from dataclasses import dataclass
from typing import Any

from d2f_core.data.manifest import Manifest
from d2f_core.evaluation.pins import REGISTERED, Pins
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import GenerateJob, check_generate
from d2f_core.model.artifact import DESCRIPTION, read_description
from d2f_core.model.base import described_copy
from d2f_core.model.sampling import DDIM, SCHEDULERS
from d2f_core.storage import join
from d2f_core.tracking import (
    RunHandle,
    TrackingError,
    model_version,
    resolve_model,
    run_metrics,
    tracking_uri,
)

logger = logging.getLogger(__name__)

EVALUATIONS_PER_STEP = {**dict.fromkeys(SCHEDULERS, 1), "euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Network evaluations per step of the solvers with fixed steps; only these can use a given number of evaluations."""
VALIDATION_LOSS = "validation_flow_loss"


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One model under evaluation, ready to generate images."""

    role: str
    """candidate, champion or base."""
    uri: str
    """URI of the model, with aliases resolved to a version."""
    job: GenerateJob

    @property
    def images(self) -> str:
        """Output URI of the model's images."""
        return self.job.config.output

    def steps(self, evaluations: int) -> int:
        """Number of solver steps for a number of network evaluations."""
        return evaluations // EVALUATIONS_PER_STEP[self.job.plan.solver]


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """A checked evaluation that is ready to run."""

    config: EvaluateConfig
    pins: Pins
    compared: tuple[ComparedModel, ...]
    feature_name: str
    """The feature network and its dimensions, as in metric names."""
    dimensions: int
    fingerprint: dict[str, Any]
    """The values that must be equal for features to be comparable."""
    reference: Manifest


def make_compared_model(config: EvaluateConfig, role: str, uri: str, resolution: int | None) -> ComparedModel:
    """Check that a model can generate the images, with height and width of `resolution` pixels.

    Raises:
        ValueError: a model, prompt file or setting cannot be used.
    """
    solver = config.base_solver if role == "base" else config.solver or carried_sampling(uri).get("solver", DDIM)
    per_step = EVALUATIONS_PER_STEP.get(solver)
    if per_step is None:
        raise EvaluateError(
            f"the {role}'s solver {solver!r} chooses its own steps. Give one of {', '.join(EVALUATIONS_PER_STEP)}."
        )
    odd = [count for count in config.evaluations if count % per_step]
    if odd:
        raise EvaluateError(f"{solver} takes {per_step} evaluations a step, so {odd} cannot be made. Leave them out.")
    job = check_generate(
        GenerateConfig(
            prompts=config.prompts,
            model=uri,
            output=join(config.output, "generations", role),
            solver=solver,
            steps=tuple(count // per_step for count in config.evaluations),
            guidance=config.guidance,
            resolution=resolution,
            seed=config.seed,
            batch_size=config.generate_batch_size,
            chunk_size=config.chunk_size,
            num_actors=config.score.num_actors,
            cpus_per_actor=config.score.cpus_per_actor,
            gpus_per_actor=config.score.gpus_per_actor,
            experiment="",
        )
    )
    if job.prompts.rows_with_steps:
        raise EvaluateError(
            f"{config.prompts!r} has rows with their own steps, which an evaluation varies. Remove the column steps."
        )
    return ComparedModel(role=role, uri=uri, job=job)


def carried_sampling(uri: str) -> dict[str, Any]:
    """The default sampling settings of a trained model; empty for a base model."""
    directory = described_copy(resolve_model(uri)).path
    return read_description(directory)["sampling"] if (directory / DESCRIPTION).is_file() else {}


def validation_loss(uri: str) -> float | None:
    """The flow loss on held-out rows that the training of a registered model measured at its last step.

    None if the model is not registered, or the loss was not measured. The loss is read, not recomputed, because only
    the training knows which rows were held out.
    """
    if not uri.startswith(REGISTERED):
        return None
    version, directory = model_version(uri), described_copy(resolve_model(uri)).path
    if not version.run_id or not (directory / DESCRIPTION).is_file():
        return None
    step = read_description(directory)["training"].get("step")
    if step is None:
        return None
    run = RunHandle(tracking_uri=tracking_uri(), experiment_id="", run_id=version.run_id)
    try:
        return run_metrics(run, int(step)).get(VALIDATION_LOSS)
    except TrackingError as error:
        logger.warning("%s: no %s: %s", uri, VALIDATION_LOSS, error)
        return None
