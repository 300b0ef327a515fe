"""What a generation job will make, decided before it starts: a function of config, prompts and model alone.

Prompts are cut into chunks in file order, chunks into batches. A chunk is done when its index part exists. So a job
that was killed goes on with the missing chunks, and the size of the cluster changes nothing in any image.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.inference.prompts import prompts_digest
from d2f_core.model.artifact import TrainedModel
from d2f_core.model.sampling import SamplerChoice
from d2f_core.storage import exists, join, list_names, read_bytes, write_bytes

PLAN_NAME = "plan.json"
PROMPTS_NAME = "prompts.parquet"
"""The checked prompts, one row group per chunk: what the actors read, however large the prompt file was."""
INDEX = "index"


class GenerateError(ValueError):
    """A generation job that cannot run as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    prompts: str = ""
    """Prompt file: .parquet, .jsonl or .csv with a column `prompt`; s3:// or local."""
    model: str = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained or base model (s3:// or local)."""
    output: str = ""
    """Where images/ and index/ are written, and manifest.json at the end."""
    solver: str | None = None
    """euler, heun, midpoint, rk4, dopri5, bosh3, adaptive_heun, dopri8 or ddim; None: what the model carries."""
    steps: tuple[int, ...] = ()
    """Every prompt is sampled once for each, from the same noise; empty: what the model carries."""
    guidance: float | None = None
    """Classifier-free guidance scale; None: what the model carries."""
    shift: float | None = None
    """Above 1, steps are spent nearer to noise; None: what the model carries."""
    seed: int = 0
    """Of rows without a seed of their own."""
    resolution: int | None = None
    """Edge of the images in pixels; None: what the UNet's config says."""
    batch_size: int = 16
    """Images per forward pass."""
    chunk_size: int = 64
    """Prompts per unit of work: what a killed actor loses at most."""
    num_actors: int = 2
    cpus_per_actor: int = 1
    """Logical CPUs that Ray reserves per actor, and torch threads of a CPU actor."""
    gpus_per_actor: float = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk_size", "num_actors", "cpus_per_actor"):
            if getattr(self, name) < 1:
                raise GenerateError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(set(self.steps)) != len(self.steps) or any(steps < 1 for steps in self.steps):
            raise GenerateError(f"steps={self.steps} must be different numbers of at least 1.")

    def check_complete(self) -> None:
        """Raises GenerateError when a URI is missing."""
        for name in ("prompts", "model", "output"):
            if not getattr(self, name):
                raise GenerateError(f"{name} is empty. Give --{name} URI.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the images; kept beside them as plan.json."""

    prompts_digest: str
    num_prompts: int
    model_uri: str
    """Pinned: never an alias."""
    model_hash: str
    solver: str
    steps: tuple[int, ...]
    guidance: float
    shift: float
    seed: int
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""
    batch_size: int
    chunk_size: int
    format: str = field(default="png", init=False)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_prompts // self.chunk_size)

    @property
    def num_images(self) -> int:
        return self.num_prompts * len(self.steps)

    def rows_of(self, chunk: int) -> range:
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, self.num_prompts))

    def identity(self) -> dict[str, Any]:
        """What must be equal for two jobs to make the same images: of the model its hash, not its place."""
        values = json.loads(json.dumps(asdict(self)))
        del values["model_uri"]
        return values


def make_plan(config: GenerateConfig, prompts: pa.Table, model: TrainedModel, model_uri: str) -> Plan:
    """Fill in what the config leaves to the model.

    Raises:
        ValueError: an unknown solver, or a resolution that the autoencoder cannot make.
    """
    defaults = model.sampling
    solver = config.solver or defaults.solver
    steps = config.steps or (defaults.steps,)
    guidance = defaults.guidance if config.guidance is None else config.guidance
    shift = defaults.shift if config.shift is None else config.shift
    for number in steps:
        SamplerChoice(solver=solver, steps=number, guidance=guidance, shift=shift)
    return Plan(
        prompts_digest=prompts_digest(prompts),
        num_prompts=prompts.num_rows,
        model_uri=model_uri,
        model_hash=model.content_hash,
        solver=solver,
        steps=steps,
        guidance=guidance,
        shift=shift,
        seed=config.seed,
        latent_shape=_latent_shape(config, model),
        batch_size=config.batch_size,
        chunk_size=config.chunk_size,
    )


def _latent_shape(config: GenerateConfig, model: TrainedModel) -> tuple[int, int, int]:
    unet = json.loads((model.base.path / "unet/config.json").read_text())
    channels = unet["in_channels"]
    if config.resolution is None:
        size = unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width
    vae = json.loads((model.base.path / "vae/config.json").read_text())
    unit = 2 ** (len(vae["block_out_channels"]) - 1)
    if config.resolution < unit or config.resolution % unit:
        raise GenerateError(f"resolution={config.resolution} must be a multiple of the autoencoder's {unit} pixels.")
    return channels, config.resolution // unit, config.resolution // unit


def part_name(chunk: int) -> str:
    """Path of a chunk's index part, relative to the output."""
    return f"{INDEX}/part-{chunk:06d}.parquet"


def chunks_done(output: str, plan: Plan) -> set[int]:
    """The chunks whose index part exists."""
    names = set(list_names(join(output, INDEX)))
    return {chunk for chunk in range(plan.num_chunks) if part_name(chunk).rsplit("/", 1)[-1] in names}


def claim_output(output: str, plan: Plan, prompts: pa.Table) -> None:
    """Write plan and prompts at the output, or check that the plan which lies there is the same.

    Raises:
        GenerateError: the output holds images of another plan; names what differs.
    """
    place = join(output, PLAN_NAME)
    try:
        write_bytes(place, json.dumps(asdict(plan), indent=1, sort_keys=True).encode(), exclusive=True)
    except FileExistsError:
        refuse_other(output, plan.identity(), json.loads(read_bytes(place)))
    if not exists(join(output, PROMPTS_NAME)):
        sink = pa.BufferOutputStream()
        pq.write_table(prompts, sink, row_group_size=plan.chunk_size)
        write_bytes(join(output, PROMPTS_NAME), sink.getvalue().to_pybytes())


def refuse_other(output: str, wanted: dict[str, Any], there: dict[str, Any]) -> None:
    """Raises GenerateError when what lies at the output differs from the wanted identity; names what differs."""
    different = [f"{name} was {there.get(name)}, now {new}" for name, new in wanted.items() if there.get(name) != new]
    if different:
        raise GenerateError(
            f"{output!r} holds images of another job ({'; '.join(different)}). Give another output, or remove that one."
        )
