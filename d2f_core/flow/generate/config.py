"""Configs of image generation and contact sheets. Imports neither torch nor a model."""

from dataclasses import dataclass
from typing import Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.identity import since
from d2f_core.model.config import PredictionName, TimeGrid

Emit = Literal["images", "latents", "pairs"]
Format = Literal["png", "webp", "jpeg"]


class GenerateError(ValueError):
    """A generation job cannot run as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class GenerateWork:
    """What images are generated, and in which units of work."""

    prompts: str = ""
    """Prompt file with a column `prompt` (.parquet, .jsonl, .json, .csv, .tsv), or a .txt of lines; s3:// or local. Its
    columns `seed`, `steps`, `guidance`, `height`, `width` and `negative_prompt` override the settings here for each
    row."""
    model: str = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained or base model (s3:// or local)."""
    base_prediction: PredictionName = since("", before="")
    """What the model predicts, if it is an unchanged base whose scheduler config says it wrongly."""
    output: str = ""
    """Where images/ (or latents/), index/ and timing/ are written, and manifest.json at the end."""
    emit: Emit = "images"
    """latents: write a latent table for training to OUTPUT/latents; pairs: include the noise that each latent came
    from."""
    format: Format = "png"
    """Format of image files; `quality` applies to webp and jpeg."""
    quality: int = 95
    """Quality of lossy formats, 1 to 100."""
    solver: str | None = None
    """euler, heun, midpoint, rk4, dopri5, bosh3, adaptive_heun, dopri8 or ddim; None: the model's default."""
    steps: tuple[int, ...] = ()
    """Numbers of solver steps; every prompt is sampled once with each, from the same noise. Empty: the model's
    default."""
    guidance: float | None = None
    """Classifier-free guidance scale; None: the model's default."""
    shift: float | None = None
    """Flow-time shift: above 1, more steps are near noise; None: the model's default."""
    time_grid: TimeGrid | None = since(None, before=None)
    """Flow times before the shift: uniform, or beta (short steps at both ends); None: the model's default."""
    seed: int = 0
    """Seed of rows that have none of their own."""
    resolution: int | None = None
    """Height and width of the images in pixels; None: the size in the UNet's config."""
    batch_size: int = 16
    """Images per forward pass."""
    chunk_size: int = 64
    """Prompts per unit of work, the most that is lost when an actor is killed."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AwaitedPoolConfig, GenerateWork):
    experiment: str = "diff2flow-generate"
    """MLflow experiment for this job's run, if MLFLOW_TRACKING_URI is set; empty: no run."""

    def __post_init__(self) -> None:
        self.check_counts("batch_size", "chunk_size", error=GenerateError)
        if len(set(self.steps)) != len(self.steps) or any(steps < 1 for steps in self.steps):
            raise GenerateError(f"steps={self.steps} must be different numbers of at least 1.")
        if not 1 <= self.quality <= 100:
            raise GenerateError(f"quality={self.quality} must be from 1 to 100.")
        if self.emit != "images" and len(self.steps) > 1:
            raise GenerateError(f"emit={self.emit!r} makes one latent per prompt. Give one number of steps.")

    def check_complete(self) -> None:
        """Raise GenerateError when a URI is missing."""
        for name in ("prompts", "model", "output"):
            if not getattr(self, name):
                raise GenerateError(f"{name} is empty. Give --{name} URI.")


@dataclass(frozen=True, kw_only=True)
class ContactSheetConfig:
    generations: tuple[str, ...] = ()
    """Outputs of generate from the same prompts, left to right."""
    titles: tuple[str, ...] = ()
    """One title per output; empty: model and solver."""
    output: str = ""
    """The PNG to write, s3:// or local."""
    title: str = "Same prompts, same noises"
    max_rows: int = 24
    """Most prompts shown, from the first one on."""
    cell: int = 160
    """Height and width in pixels of one image on the sheet."""
    run: str = ""
    """Output URI of a training to whose MLflow run the picture is added; empty: none."""
    experiment: str = "diff2flow"
    """MLflow experiment of that run."""

    def __post_init__(self) -> None:
        if self.titles and self.generations and len(self.titles) != len(self.generations):
            raise ValueError(f"{len(self.titles)} titles for {len(self.generations)} generations. Give one for each.")
