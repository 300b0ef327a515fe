"""What is exported, and to which layout."""

from dataclasses import dataclass
from typing import Literal

from d2f_core.train.config import Which


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = "models:/emoji-flow@candidate"
    """models:/NAME@ALIAS, or the directory of a trained model (s3:// or local)."""
    output: str = ""
    """Directory to write, or for `single-file` the .safetensors file; s3:// or local."""
    layout: Literal["diffusers", "peft", "single-file"] = "diffusers"
    """`diffusers`: a whole pipeline. `peft`: the adapter. `single-file`: a LoRA as ComfyUI and sd-scripts read it."""
    base: str = ""
    """Where the base lies here, when it moved; empty: where the model says."""

    def __post_init__(self) -> None:
        if self.layout == "peft" and self.base:
            raise ValueError(f"base={self.base!r} is not used by layout='peft', which copies the adapter. Remove it.")


@dataclass(frozen=True, kw_only=True)
class CheckpointExportConfig:
    run: str = ""
    """Output of the finetuning: its config.yaml and its checkpoints lie there."""
    step: Which = "newest"
    """Optimizer steps of the checkpoint; `best`: by `train.keep_best_metric` of those that were evaluated."""
    weights: Literal["", "ema", "trained"] = ""
    """The averages or the weights themselves; empty: the averages if the run keeps any, as at its end."""
    output: str = ""
    """Directory of the model, s3:// or local; a model that lies there is replaced."""
    base: str = ""
    """Where the base lies here, when it moved; empty: where the run's config.yaml says."""

    def __post_init__(self) -> None:
        if self.step not in ("newest", "best") and int(self.step) < 0:
            raise ValueError(f"step={self.step} must be at least 0, or 'newest' or 'best'.")
