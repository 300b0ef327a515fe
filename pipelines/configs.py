"""One frozen dataclass per training job; the other jobs' configs lie beside their owners."""

from dataclasses import dataclass, field

from d2f_core.model.artifact import SamplingDefaults
from d2f_core.model.autoencoder_training import AutoencoderLossConfig
from d2f_core.model.text_to_image import ModelConfig, PreviewConfig
from d2f_core.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    model: ModelConfig
    latents: str
    """Latent table to train on."""
    output: str
    """Where checkpoints and the resolved config go; the same output again resumes."""
    holdout_rows: int = 32
    """Rows of the table that are only validated on."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How the trained model is to be sampled; carried by the model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    experiment: str = "diff2flow"
    """MLflow experiment."""
    name: str = "finetune"
    """MLflow run name."""


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig:
    vae_config: str
    """Directory with the config.json of an AutoencoderKL; weights are drawn new."""
    images: str
    """Image table to train on; all images of one size."""
    output: str
    """Where checkpoints, the resolved config and, at the end, `vae/` go."""
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    holdout_rows: int = 32
    train: TrainConfig = field(default_factory=TrainConfig)
    experiment: str = "diff2flow"
    name: str = "autoencoder"
