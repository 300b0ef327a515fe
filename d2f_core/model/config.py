"""What is trained, from what, with which loss, and how it is sampled. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from d2f_core.identity import since
from d2f_core.model.caption_rules import DEFAULT, CaptionRules
from d2f_core.objective.time_sampling import NaiveTarget, TimeSampling

PredictionName = Literal["", "epsilon", "v_prediction", "sample", "flow_prediction"]
TaskName = Literal["text_to_image", "image_to_depth"]
TimeGrid = Literal["uniform", "beta"]
PRESETS = ("base", "small", "attention")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    """Rank of each adapter."""
    alpha: float | None = None
    """Adapter scale: it adds `alpha / rank * B A` to the weights; default: the rank, so a factor of 1."""
    targets: Literal["attention", "all"] = "all"
    """`attention`: q, k, v and output projections. `all`: convolutions and feed-forward layers too."""
    preset: Literal["", "base", "small", "attention"] = ""
    """The paper's layers and ranks, in place of `rank` and `targets`: on SD 2.1, `base` trains 207.5 M parameters,
    `small` 64.7 M and `attention` (q, k, v) 10.1 M."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank={self.rank} must be at least 1. Use 4 to 128.")
        if self.preset not in ("", *PRESETS):
            raise ValueError(f"lora preset={self.preset!r} is not known. Use one of {', '.join(PRESETS)}, or ''.")
        if self.preset and self.alpha is not None:
            raise ValueError(
                f"lora alpha={self.alpha} with preset={self.preset!r}: presets have a scale of 1. Leave alpha out, or "
                "give rank, alpha and targets without a preset."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, from what, with which loss."""

    base: str
    """Base model: a directory in diffusers' layout, an s3:// prefix, a hub id, or one file (.safetensors) in the
    original layout of SD 1.5, SD 2.1 or SDXL."""
    base_prediction: PredictionName = since("", before="")
    """What the base's network predicts, if its scheduler config says it wrongly; empty: as the config says. Where the
    weights are first loaded they are probed, and a base that predicts something else is refused."""
    task: TaskName = "text_to_image"
    """image_to_depth predicts depth from an image, whose latents are concatenated to the noisy depth latents; no
    text."""
    start: str = ""
    """Trained model to start from, as further rounds of reflow do: its directory or models:/NAME/VERSION. It must be
    trained on this base by the same method. Empty: start from the base."""
    from_scratch: bool = False
    """Keep the base's architecture, but start from new random weights."""
    objective: Literal["diff2flow", "flow_matching", "diffusion"] = "diff2flow"
    """Loss: flow matching through the alignment, naive flow matching, or the base's diffusion loss."""
    naive_target: NaiveTarget = since(
        "noise_minus_data", before="data_minus_noise", only=("objective", "flow_matching"), in_files=True
    )
    """flow_matching: what the network learns to put out. `noise_minus_data` as rectified-flow models do, which other
    programs can sample; `data_minus_noise` as the paper's published baseline does. A config file without this field
    means data_minus_noise, which was the only one before the field existed."""
    method: Literal["full", "lora"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    """LoRA settings; used when `method` is lora."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, which classifier-free guidance needs. For SDXL the empty
    caption's states are zeros."""
    captions: CaptionRules = since(DEFAULT, before=DEFAULT)
    """How captions are read, in training and by the trained model. Left at its defaults: as the latent tables say."""
    times: TimeSampling = field(default_factory=TimeSampling)
    """Distribution of flow times in the flow losses."""
    shift_by_resolution: bool = False
    """Also shift flow times by sqrt(pixels / pixels of the base's own size) for each image size: larger images keep
    more signal at equal flow time. Sampling has its own shift."""
    min_snr_gamma: float = 0.0
    """Min-SNR weighting of the loss `diffusion`: noise levels with a higher signal-to-noise ratio count less; 5 is
    usual, 0 is off."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must lie in [0, 1). Use 0.02 to 0.15.")
        if self.from_scratch and self.method == "lora":
            raise ValueError("from_scratch=True with method='lora' would adapt random weights. Use method='full'.")
        if self.from_scratch and self.start:
            raise ValueError(f"start={self.start!r} with from_scratch=True contradict each other. Give one of them.")
        if self.objective == "diffusion" and (self.times != TimeSampling() or self.shift_by_resolution):
            raise ValueError(
                "times and shift_by_resolution belong to the flow losses; objective='diffusion' draws timesteps "
                "evenly. Remove them."
            )
        if self.min_snr_gamma < 0 or (self.min_snr_gamma and self.objective != "diffusion"):
            raise ValueError(
                f"min_snr_gamma={self.min_snr_gamma} with objective={self.objective!r}: it must be 0, or above 0 with "
                "objective='diffusion'."
            )
        if self.joins_latents and self.method == "lora" and (self.lora.preset or self.lora.targets) == "attention":
            raise ValueError(
                f"task={self.task!r} with a LoRA on attention alone: the first convolution, which must learn to read "
                "the image's latents, is not trained. Use lora.preset 'small' or 'base', lora.targets 'all', or "
                "method='full'."
            )

    @property
    def joins_latents(self) -> bool:
        """Whether the network reads an image's latents in addition to the noisy latents."""
        return self.task == "image_to_depth"


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    square_weight: float = 1.0
    """Weight of the mean squared error relative to the mean absolute error."""
    kl_weight: float = 3e-4
    """Weight of the mean KL divergence per latent entry; keeps latents smooth enough to be generated."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Default sampling settings of a model, stored with its weights."""

    solver: str = "euler"
    """euler, midpoint, heun or rk4 in flow time; ddim for a diffusion model."""
    steps: int = 10
    """Steps from noise to data."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 is none."""
    shift: float = 1.0
    """Flow-time shift: above 1, more steps are near noise, as large images need; not used by ddim. 1 on a base that is
    a flow model: the base's own."""
    resolution: int | None = None
    """Height and width of the images in pixels; None: the size of the training images, or for a base model the size its
    UNet was trained on."""
    time_grid: TimeGrid = since("uniform", before="uniform")
    """Flow times before the shift: uniform, or beta (quantiles of Beta(0.6, 0.6): short steps at both ends); not used
    by ddim and the adaptive solvers."""

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be at least 1 pixel, or None for the base's own.")
        if not (self.steps >= 1 and self.shift > 0 and math.isfinite(self.guidance * self.shift)):
            raise ValueError(f"{self} needs steps of at least 1, a shift above 0 and finite numbers. Correct it.")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Previews: samples drawn during training, always from the same noise."""

    prompts: tuple[str, ...] = ()
    """Prompts of a text-to-image preview."""
    rows: int = 8
    """Held-out rows shown in an image-to-depth preview; 0: none."""
    resolution: int | None = None
    """Height and width in pixels of a text-to-image preview; None: those of the training images."""
    steps: int = 10
    guidance: float = 3.0
    """Guidance scale of a text-to-image preview."""
    columns: int = 8
