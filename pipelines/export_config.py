"""Configs of exporting a model or a checkpoint."""

from dataclasses import dataclass
from typing import Literal

from d2f_core.model.config import PredictionName
from d2f_core.train.config import Which


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = "models:/emoji-flow@candidate"
    """models:/NAME@ALIAS, or the directory of a trained model (s3:// or local)."""
    output: str = ""
    """Directory to write, or for `single-file` the .safetensors file; s3:// or local."""
    layout: Literal["diffusers", "peft", "single-file"] = "diffusers"
    """`diffusers`: a whole pipeline. `peft`: the adapter. `single-file`: a LoRA for ComfyUI and sd-scripts."""
    base: str = ""
    """Present location of the base model, if it has moved; empty: as recorded in the model."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the written weights: the UNet of `diffusers`, whose other parts stay as they are, or the LoRA of
    `single-file`. float32 is exact, the others take half the room."""
    ends: Literal["apart", "inside"] = "apart"
    """Of `single-file`, where the first and the last convolution go, if they are adapted. `apart`: to a second file,
    NAME-ends.safetensors; all programs read both. `inside`: one file, which ComfyUI and Forge read whole; diffusers
    refuses it if their biases were trained (presets `base` and `small`)."""

    def __post_init__(self) -> None:
        if self.ends != "apart" and self.layout != "single-file":
            raise ValueError(f"ends={self.ends!r} is not used by layout={self.layout!r}. Remove it.")
        if self.layout == "peft" and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r} is not used by layout='peft', which copies the adapter. Remove it.")
        if self.layout == "peft" and self.base:
            raise ValueError(f"base={self.base!r} is not used by layout='peft', which copies the adapter. Remove it.")


@dataclass(frozen=True, kw_only=True)
class SchedulerExportConfig:
    output: str = "diff2flow_scheduler.py"
    """The Python file to write, s3:// or local. A program imports it by this name, which must be one of a module."""

    def __post_init__(self) -> None:
        name = self.output.rsplit("/", 1)[-1]
        if not (name.endswith(".py") and name.removesuffix(".py").isidentifier()):
            raise ValueError(f"output={self.output!r} must name a Python module, such as diff2flow_scheduler.py.")


@dataclass(frozen=True, kw_only=True)
class CheckpointExportConfig:
    run: str = ""
    """Output URI of the finetuning, with its config.yaml and checkpoints."""
    step: Which = "newest"
    """Step of the checkpoint, `newest`, or `best`: the best evaluated one by `train.keep_best_metric`."""
    weights: Literal["", "ema", "trained"] = ""
    """`ema`: averaged weights. `trained`: the weights themselves. Empty: the averaged ones if the run keeps them."""
    output: str = ""
    """Directory for the model, s3:// or local; an existing model there is replaced."""
    base: str = ""
    """Present location of the base model, if it has moved; empty: as in the run's config.yaml."""

    def __post_init__(self) -> None:
        if self.step not in ("newest", "best") and int(self.step) < 0:
            raise ValueError(f"step={self.step} must be at least 0, or 'newest' or 'best'.")


@dataclass(frozen=True, kw_only=True)
class CheckpointFileExportConfig:
    model: str = "models:/emoji-flow@candidate"
    """models:/NAME@ALIAS, the directory of a trained model, or a base model (s3:// or local)."""
    output: str = ""
    """The .safetensors file to write, s3:// or local; a file there is replaced."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of the weights. float32 is exact; values that float16 cannot hold are refused."""
    title: str = ""
    """The model's name in programs; empty: the file's name."""
    base_prediction: PredictionName = ""
    """What the model predicts, if it is an unchanged base whose scheduler config says it wrongly."""
    base: str = ""
    """Present location of the base model, if it has moved; empty: as recorded in the model."""


@dataclass(frozen=True, kw_only=True)
class MatcherExportConfig:
    model: str = "models:/matcher@candidate"
    """models:/NAME@ALIAS, or the directory of a trained matcher (s3:// or local)."""
    output: str = ""
    """Directory for the vision transformer with its adapters merged, which stock transformers opens; s3:// or local."""
    base: str = ""
    """Present location of the base, if it has moved; empty: as recorded in the matcher."""
