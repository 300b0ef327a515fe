"""What is drawn, and what is shown of it. Light: neither torch nor a model."""

from dataclasses import dataclass
from typing import Literal

from d2f_core.batch.config import AwaitedPoolConfig

Emit = Literal["images", "latents", "pairs"]
Format = Literal["png", "webp", "jpeg"]


class GenerateError(ValueError):
    """A generation job that cannot run as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class GenerateWork:
    """What is drawn, and in which pieces."""

    prompts: str = ""
    """Prompt file: .parquet, .jsonl or .csv with a column `prompt`; s3:// or local. Its columns `seed`, `steps`,
    `guidance`, `height`, `width` and `negative_prompt` go before the settings here, row by row."""
    model: str = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained or base model (s3:// or local)."""
    output: str = ""
    """Where images/ (or latents/), index/ and timing/ are written, and manifest.json at the end."""
    emit: Emit = "images"
    """latents: a latent table at OUTPUT/latents that a training reads; pairs: with the noise each latent came from."""
    format: Format = "png"
    """Of image files; webp and jpeg at `quality`."""
    quality: int = 95
    """Of lossy formats, 1 to 100."""
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


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AwaitedPoolConfig, GenerateWork):
    experiment: str = "diff2flow-generate"
    """MLflow experiment that gets a run of this job, where MLFLOW_TRACKING_URI is set; empty: none."""

    def __post_init__(self) -> None:
        self.check_counts("batch_size", "chunk_size", error=GenerateError)
        if len(set(self.steps)) != len(self.steps) or any(steps < 1 for steps in self.steps):
            raise GenerateError(f"steps={self.steps} must be different numbers of at least 1.")
        if not 1 <= self.quality <= 100:
            raise GenerateError(f"quality={self.quality} must be from 1 to 100.")
        if self.emit != "images" and len(self.steps) > 1:
            raise GenerateError(f"emit={self.emit!r} makes one latent per prompt. Give one number of steps.")

    def check_complete(self) -> None:
        """Raises GenerateError when a URI is missing."""
        for name in ("prompts", "model", "output"):
            if not getattr(self, name):
                raise GenerateError(f"{name} is empty. Give --{name} URI.")


@dataclass(frozen=True, kw_only=True)
class ContactSheetConfig:
    generations: tuple[str, ...] = ()
    """Outputs of generate, made from the same prompts; left to right."""
    titles: tuple[str, ...] = ()
    """One per generation; empty: model and solver."""
    output: str = ""
    """The PNG to write, s3:// or local."""
    title: str = "Same prompts, same noises"
    max_rows: int = 24
    """Prompts shown, from the first one on."""
    cell: int = 160
    """Edge of one image on the sheet in pixels."""
    run: str = ""
    """Output URI of a training whose MLflow run also gets the picture; empty: none."""
    experiment: str = "diff2flow"
    """MLflow experiment of that run."""

    def __post_init__(self) -> None:
        if self.titles and self.generations and len(self.titles) != len(self.generations):
            raise ValueError(f"{len(self.titles)} titles for {len(self.generations)} generations. Give one for each.")
