"""The models of an evaluation, and how each generates its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2f_core.data.manifest import Manifest
from d2f_core.evaluation.pins import Pins
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError
from d2f_core.flow.evaluate.feature_table import KnownRows
from d2f_core.flow.evaluate.projection import features_name
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import GenerateJob, check_generate
from d2f_core.model.artifact import DESCRIPTION, read_description
from d2f_core.model.base import describe_base, described_copy
from d2f_core.model.config import PredictionName
from d2f_core.model.sampling import DDIM, SCHEDULERS
from d2f_core.storage import join
from d2f_core.tracking import resolve_model

ROLES = ("candidate", "champion", "base")
EVALUATIONS_PER_STEP = {**dict.fromkeys(SCHEDULERS, 1), "euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Network evaluations per step of the solvers with fixed steps; only these can use a given number of evaluations."""


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
    network: str
    """Name of the feature network."""
    width: int
    """Features per image of the network."""
    dimensions: int
    """Those that are compared: projected ones, or all."""
    fingerprint: dict[str, Any]
    """The values that must be equal for features to be comparable."""
    reference: Manifest
    known: KnownRows

    @property
    def feature_name(self) -> str:
        """The feature network and the compared dimensions, as in metric names."""
        return features_name(self.network, self.width, self.dimensions)

    @property
    def rival(self) -> str | None:
        """The role that the candidate is judged against; None: it is judged by limits alone."""
        roles = {each.role for each in self.compared}
        return next((role for role in ("champion", "base") if role in roles), None)


def compared_models(config: EvaluateConfig, pins: Pins) -> tuple[ComparedModel, ...]:
    """The models to compare, the candidate first. All draw at the candidate's size and, unless each is to keep its own,
    at the candidate's guidance: a guidance of three is worth more than most trainings.

    Raises:
        ValueError: a model, prompt file or setting cannot be used.
    """
    wanted = {role: getattr(pins, role) for role in ROLES if getattr(pins, role)}
    if pins.champion == pins.candidate:
        del wanted["champion"]
    edge = config.resolution or carried(pins.candidate, "sampling").get("resolution")
    candidate = make_compared_model(config, "candidate", wanted.pop("candidate"), edge)
    if config.guidance is None and not config.own_guidance:
        config = replace(config, guidance=candidate.job.model.sampling.guidance)
    return candidate, *(make_compared_model(config, role, uri, edge) for role, uri in wanted.items())


def unequal(compared: Sequence[ComparedModel]) -> list[str]:
    """What differs between the models besides themselves and their solvers, and who draws otherwise than by itself, in
    words.
    """
    guidance = {each.role: each.job.plan.guidance for each in compared}
    flows = [each for each in compared if each.job.plan.solver not in SCHEDULERS]
    times = {each.role: f"{each.job.plan.shift:g} ({each.job.plan.time_grid})" for each in flows}
    found = []
    if len(set(times.values())) > 1:
        found.append(f"the shift of flow times differs: {', '.join(f'{role} {how}' for role, how in times.items())}")
    rules = {each.role: each.job.model.base.captions for each in compared}
    if len(set(rules.values())) > 1:
        found.append(f"prompts are read differently: {', '.join(f'{role} {how}' for role, how in rules.items())}")
    if len(set(guidance.values())) > 1:
        return [*found, f"guidance differs: {', '.join(f'{role} {scale:g}' for role, scale in guidance.items())}"]
    own = {each.role: each.job.model.sampling.guidance for each in compared}
    return found + [
        f"the {role} draws at guidance {guidance[role]:g}, as all do; by itself it would at {scale:g}"
        for role, scale in own.items()
        if scale != guidance[role]
    ]


def make_compared_model(config: EvaluateConfig, role: str, uri: str, resolution: int | None) -> ComparedModel:
    """Check that a model can generate the images, with height and width of `resolution` pixels.

    Raises:
        ValueError: a model, prompt file or setting cannot be used.
    """
    sampling = carried(uri, "sampling")
    told = config.base_prediction if role == "base" or not sampling else ""
    solver = _solver(config, role, uri, sampling, told)
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
            base_prediction=told,
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


def _solver(config: EvaluateConfig, role: str, uri: str, sampling: Mapping[str, Any], told: PredictionName) -> str:
    own = config.base_solver if role == "base" else config.solver or sampling.get("solver")
    if sampling or (own and role != "base"):
        return own or DDIM
    is_flow = describe_base(resolve_model(uri)).read_as(told).is_flow
    return "euler" if is_flow else own or DDIM


def carried(uri: str, part: str) -> dict[str, Any]:
    """A part of what a trained model says of itself, such as `sampling` or `training`; empty for a base model."""
    directory = described_copy(resolve_model(uri)).path
    return read_description(directory)[part] if (directory / DESCRIPTION).is_file() else {}
