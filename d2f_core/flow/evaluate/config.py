"""Config of an evaluation: the models and how they are compared. Imports neither torch nor numpy."""

from dataclasses import dataclass, field

from d2f_core.batch.config import ActorPoolConfig
from d2f_core.evaluation.config import GateConfig
from d2f_core.identity import since
from d2f_core.model.config import PredictionName

AUTO = "auto"


class EvaluateError(ValueError):
    """An evaluation cannot run as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class ScoreWork:
    """The networks from which features are extracted."""

    features: str = "efficientnet-lite0"
    """efficientnet-lite0, the file of Inception-v3's weights as FID uses them (.pth or .safetensors), or the directory
    of a vision model; files and directories local or s3://."""
    resize: str = since("", before="")
    """How images are resized for Inception-v3: clean-fid or torch-fidelity; empty: clean-fid, of other networks their
    own way."""
    dimensions: int = 64
    """Number of fixed random directions that features are projected to for what is compared; 0: all of the network's
    features. A covariance from fewer than about 30 images per dimension is mostly noise."""
    clip: str = ""
    """Directory of a CLIP model that scores images against their prompts; empty: no such score."""
    batch_size: int = 32
    """Images per forward pass."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ActorPoolConfig, ScoreWork):
    """How features are extracted from images."""

    def __post_init__(self) -> None:
        self.check_counts("batch_size", error=ValueError, where="score: ")
        if self.dimensions < 0:
            raise ValueError(f"score: dimensions={self.dimensions} must be at least 1, or 0 for all.")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How metrics and their confidence intervals are computed."""

    replicates: int = 200
    """Bootstrap replicates per confidence interval."""
    neighbours: int = 3
    """Number k of nearest neighbours for precision and recall."""
    pairwise_rows: int = 2000
    """Most images of each set, chosen at random, for metrics over all pairs: kernel distance, precision and recall, and
    the distance between two models. At least 30: of fewer, some resampled set holds a single image."""
    paired_rows: int = since(50_000, before=50_000)
    """Most images of each set, chosen at random, that the compared metrics and their intervals are made of."""

    def __post_init__(self) -> None:
        for name, least in (("replicates", 20), ("neighbours", 1), ("pairwise_rows", 30), ("paired_rows", 30)):
            if getattr(self, name) < least:
                raise ValueError(f"measure: {name}={getattr(self, name)} must be at least {least}.")
        if self.neighbours >= self.pairwise_rows:
            raise ValueError(f"measure: neighbours={self.neighbours} must be below pairwise_rows={self.pairwise_rows}.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    candidate: str = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a model's directory (local or s3://)."""
    champion: str = "auto"
    """Model to compare with; auto: the @champion of the candidate's registered model, if there is one; empty: none."""
    base: str = ""
    """The unchanged base model as a further comparison; empty: none."""
    prompts: str = ""
    """Prompt file, as for generate; all models sample each prompt from the same noise. Empty: the reference's captions.
    Give prompts that no training saw; below some 1,000, only large differences are seen."""
    reference: str = ""
    """Real images: an image table, or an output of generate (its largest number of steps). Empty: the images that the
    candidate's training held out."""
    training: str = since(AUTO, before=AUTO)
    """Image table that the candidate was trained on, for the rule about memorised images; auto: as its training says;
    empty: that rule is not applied."""
    training_images: int = since(20_000, before=20_000)
    """So many images of `training` are enough: those of files that are chosen at random."""
    output: str = ""
    """Where generations/, features/, metrics.json and report.html go."""
    evaluations: tuple[int, ...] = (2, 4, 10, 25)
    """Network evaluations per image at which quality is measured."""
    solver: str | None = None
    """Fixed-step solver of candidate and champion; None: each model's default."""
    base_solver: str = "ddim-clean"
    """Solver of the base model; ddim-clean ends without noise as a flow does, ddim as stock pipelines do; euler
    evaluates the base as an untrained flow model. A base that is a flow model is always sampled by Euler."""
    base_prediction: PredictionName = since("", before="")
    """What the base predicts, if its scheduler config says it wrongly."""
    guidance: float | None = None
    """Guidance scale of all models; None: the candidate's default, for all of them."""
    own_guidance: bool = since(False, before=False)
    """Sample each model at its own default guidance instead, for models with guidance in their weights, such as
    reflowed ones; the verdict then says what differs."""
    resolution: int | None = None
    """Height and width of all models' images in pixels; None: the candidate's default."""
    seed: int = 0
    """Seed of prompts that have none of their own."""
    generate_batch_size: int = 16
    """Images per forward pass."""
    chunk_size: int = 64
    """Prompts per unit of work."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Feature extraction; the number and size of its actors also apply to generating."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    promote: bool = True
    """Move @champion to the candidate (a registered model) when the gate passes."""
    champion_alias: str = "champion"
    straightness_prompts: int = 16
    """Number of prompts, from the first one on, whose paths are measured; 0: none."""
    straightness_steps: int = 25
    """Euler steps of such a path."""
    loss_rows: int = since(128, before=128)
    """Most images of the reference, chosen at random, on which each model's flow loss is measured; 0: none."""
    shown_prompts: int = 6
    """Number of prompts, from the first one on, whose images the report shows."""
    experiment: str = "diff2flow-evaluate"
    """MLflow experiment; empty: no run."""

    def __post_init__(self) -> None:
        counts = self.evaluations
        if not counts or len(set(counts)) != len(counts) or min(counts) < 1:
            raise EvaluateError(f"evaluations={counts} must be different numbers of at least 1.")
        for name in ("straightness_prompts", "shown_prompts", "loss_rows"):
            if getattr(self, name) < 0:
                raise EvaluateError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.training_images < 1:
            raise EvaluateError(f"training_images={self.training_images} must be at least 1. 20000 is usual.")
        if self.straightness_steps < 2:
            raise EvaluateError(f"straightness_steps={self.straightness_steps} must be at least 2.")
        if self.own_guidance and self.guidance is not None:
            raise EvaluateError(f"guidance={self.guidance} and own_guidance exclude each other. Give one.")
        if not self.champion_alias:
            raise EvaluateError("champion_alias is empty. Use 'champion'.")

    @property
    def fewest_images(self) -> int:
        """Images that a reference has at least."""
        return 4 * (self.measure.neighbours + 1)

    def check_complete(self) -> None:
        """Raise EvaluateError when a URI is missing."""
        for name in ("candidate", "output"):
            if not getattr(self, name):
                raise EvaluateError(f"{name} is empty. Give --{name} URI.")
