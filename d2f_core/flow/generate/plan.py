"""The plan of a generation job, made before it starts; it depends only on config, prompts and model.

Prompts are cut into chunks in file order, chunks into batches. A chunk is done when its index part exists. So a job
that was killed resumes with the missing chunks, and the size of the cluster does not affect any image.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_core.batch.output import IndexedOutput
from d2f_core.flow.generate.config import Emit, Format, GenerateConfig, GenerateError
from d2f_core.flow.generate.prompts import PromptError, PromptFile, copy_prompts
from d2f_core.flow.generate.sampler import Request, fill_request
from d2f_core.identity import identity_values, since
from d2f_core.model.artifact import DescribedModel
from d2f_core.model.base import BaseModelError
from d2f_core.model.config import TimeGrid
from d2f_core.storage import exists, join, upload_tree

PROMPTS_NAME = "prompts.parquet"
"""File of the checked prompts, one row group per chunk, so that an actor reads only its chunk of a large file."""
TIMING, LATENTS = "timing", "latents"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines the images; stored beside them as plan.json."""

    prompts_digest: str
    num_prompts: int
    num_images: int
    model_uri: str
    """URI of the model, with aliases resolved to a version."""
    model_hash: str
    base_prediction: str = since("", before="")
    """What an unchanged base was said to predict."""
    solver: str
    steps: tuple[int, ...]
    guidance: float
    shift: float
    seed: int
    height: int
    """Height of the images in pixels."""
    width: int
    """Width of the images in pixels."""
    batch_size: int
    chunk_size: int
    emit: Emit
    format: Format
    quality: int
    time_grid: TimeGrid = since("uniform", before="uniform")

    @property
    def num_chunks(self) -> int:
        return -(-self.num_prompts // self.chunk_size)

    def requests(self, rows: list[dict[str, Any]]) -> list[Request]:
        """The requests of a chunk's rows: all rows at the first number of steps, then at the next, and so on. A row
        with its own number of steps occurs only once, in the first turn."""
        return [
            self._request(row, row["steps"] or steps)
            for turn, steps in enumerate(self.steps)
            for row in rows
            if turn == 0 or row["steps"] is None
        ]

    def _request(self, row: dict[str, Any], steps: int) -> Request:
        return Request(
            sample_id=row["sample_id"],
            prompt=row["prompt"],
            negative_prompt=row["negative_prompt"],
            seed=self.seed if row["seed"] is None else row["seed"],
            solver=self.solver,
            steps=steps,
            guidance=self.guidance if row["guidance"] is None else row["guidance"],
            shift=self.shift,
            time_grid=self.time_grid,
            height=row["height"] or row["width"] or self.height,
            width=row["width"] or row["height"] or self.width,
        )

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two jobs to make the same images; includes the model's hash, not its
        URI.
        """
        return {name: value for name, value in identity_values(self).items() if name != "model_uri"}


def fill_settings(config: GenerateConfig, prompts: PromptFile, model: DescribedModel) -> list[Request]:
    """A request for each number of steps, with the model's defaults for unset fields; reads no weights.

    Raises:
        ValueError: the solver is unknown, or the autoencoder cannot produce the size.
    """
    try:
        filled = [
            fill_request(
                model,
                prompt="",
                solver=config.solver,
                steps=steps,
                guidance=config.guidance,
                shift=config.shift,
                time_grid=config.time_grid,
                height=config.resolution,
                width=config.resolution,
            )
            for steps in config.steps or (model.sampling.steps,)
        ]
    except BaseModelError as error:
        raise GenerateError(f"resolution={config.resolution}: {error}") from None
    _check_sizes(config, prompts, model)
    return filled


def make_plan(config: GenerateConfig, prompts: PromptFile, model: DescribedModel, model_uri: str) -> Plan:
    """Make the plan, which holds the model's hash.

    Raises:
        ValueError: see `fill_settings`.
    """
    filled = fill_settings(config, prompts, model)
    turns, first = len(filled), filled[0]
    return Plan(
        prompts_digest=prompts.digest,
        num_prompts=prompts.num_rows,
        num_images=turns * prompts.num_rows - (turns - 1) * prompts.rows_with_steps,
        model_uri=model_uri,
        model_hash=model.content_hash,
        base_prediction=config.base_prediction,
        solver=first.solver,
        steps=tuple(request.steps for request in filled),
        guidance=first.guidance,
        shift=first.shift,
        time_grid=first.time_grid,
        seed=config.seed,
        height=first.height,
        width=first.width,
        batch_size=config.batch_size,
        chunk_size=config.chunk_size,
        emit=config.emit,
        format=config.format,
        quality=config.quality,
    )


def _check_sizes(config: GenerateConfig, prompts: PromptFile, model: DescribedModel) -> None:
    for number, height, width in prompts.sizes:
        if height is None and width is None:
            continue
        if config.emit != "images":
            raise GenerateError(
                f"{prompts.uri!r} row {number} has a size of its own, but latents of one table have one shape. Remove "
                "the columns height and width, and give --resolution."
            )
        try:
            model.base.latent_shape(height or width or 0, width or height or 0)
        except BaseModelError as error:
            raise PromptError(f"{prompts.uri!r} row {number}: {error}") from None


def claim_output(output: str, plan: Plan, prompts: PromptFile) -> IndexedOutput:
    """Write plan and prompts at the output, or check that the existing plan is the same.

    Raises:
        OutputError: the output holds images of another plan; names the differences.
    """
    claimed = IndexedOutput(output, plan.identity(), plan.num_chunks, model_uri=plan.model_uri)
    if not exists(join(output, PROMPTS_NAME)):
        with tempfile.TemporaryDirectory() as directory:
            copy_prompts(prompts, Path(directory, PROMPTS_NAME), plan.chunk_size)
            upload_tree(Path(directory), output)
    return claimed
