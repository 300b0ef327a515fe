r"""Write a trained model in another tool's layout, or export a model from a training's checkpoint.

python -m pipelines.export diffusers --model models:/emoji-flow@candidate --output /data/emoji-flow
python -m pipelines.export single-file --model s3://d2f/runs/emoji-lora/model --output lora.safetensors
python -m pipelines.export ldm --model models:/sdxl-flow@candidate --output sdxl-flow.safetensors
python -m pipelines.export transformers --model models:/matcher@candidate --output /data/matcher
python -m pipelines.export scheduler --output diff2flow_scheduler.py
python -m pipelines.export checkpoint --run s3://d2f/runs/emoji-lora --step 200 --output s3://d2f/models/emoji-200
"""

import logging

from pipelines.cli import run_job
from pipelines.export_config import (
    CheckpointExportConfig,
    CheckpointFileExportConfig,
    ExportConfig,
    MatcherExportConfig,
    SchedulerExportConfig,
)

logger = logging.getLogger(__name__)


RECIPES = {
    "diffusers": ExportConfig(),
    "peft": ExportConfig(layout="peft"),
    "single-file": ExportConfig(layout="single-file"),
    "ldm": CheckpointFileExportConfig(),
    "transformers": MatcherExportConfig(),
    "scheduler": SchedulerExportConfig(),
    "checkpoint": CheckpointExportConfig(),
}
Config = (
    ExportConfig | CheckpointFileExportConfig | MatcherExportConfig | SchedulerExportConfig | CheckpointExportConfig
)


def check(config: Config) -> None:
    """Check the config; raises ValueError if the export cannot work."""
    if isinstance(config, CheckpointExportConfig):
        from pipelines.checkpoint_export import check_checkpoint

        check_checkpoint(config)
    elif isinstance(config, SchedulerExportConfig):
        from d2f_core.storage import check_reachable

        check_reachable(config.output, write=True)
    else:
        _model_files(config)


def _model_files(config: ExportConfig | CheckpointFileExportConfig | MatcherExportConfig) -> str:
    """Location of the model's files."""
    from d2f_core.storage import check_reachable
    from d2f_core.tracking import resolve_model

    if not config.output:
        raise ValueError("output is empty. Give --output URI.")
    check_reachable(config.model)
    check_reachable(config.output, write=True)
    return resolve_model(config.model)


def main(config: Config) -> None:
    if isinstance(config, CheckpointExportConfig):
        from pipelines.checkpoint_export import export_checkpoint

        logger.info("wrote %s", export_checkpoint(config))
    elif isinstance(config, SchedulerExportConfig):
        from d2f_core import storage
        from d2f_core.model.standalone_scheduler import standalone_scheduler

        storage.write_bytes(config.output, standalone_scheduler().encode())
        logger.info("wrote %s", config.output)
    elif isinstance(config, MatcherExportConfig):
        from d2f_core.correspondence.publish.job import export_transformers

        logger.info("wrote %s", export_transformers(_model_files(config), config.output, base_uri=config.base or None))
    elif isinstance(config, CheckpointFileExportConfig):
        _export_checkpoint_file(config)
    elif config.layout == "peft":
        from d2f_core.model.export_adapter import export_peft

        model = _model_files(config)
        logger.info("wrote %s", export_peft(model, config.output))
        _say_how_captions_are_read(model)
    elif config.layout == "diffusers":
        _export_diffusers(config)
    else:
        _export_lora_file(config)


def _export_diffusers(config: ExportConfig) -> None:
    import torch

    from d2f_core.model.export import export_diffusers

    dtype = getattr(torch, config.dtype)
    model = _model_files(config)
    done = export_diffusers(model, config.output, base_uri=config.base or None, dtype=dtype)
    logger.info("wrote %s", done.target)
    _say_how_captions_are_read(model)
    for part, reason in done.missing.items():
        logger.info("give %s to from_pretrained yourself: %s", part, reason)


def _export_lora_file(config: ExportConfig) -> None:
    import torch

    from d2f_core.model.export_adapter import export_single_file_lora

    model, dtype = _model_files(config), getattr(torch, config.dtype)
    file = export_single_file_lora(model, config.output, base_uri=config.base or None, dtype=dtype, ends=config.ends)
    logger.info("wrote %s: %d keys of %d layers", file.target, file.keys, file.layers)
    _say_how_captions_are_read(model)
    if file.ends_target:
        logger.info("wrote %s: %s; load it beside the first", file.ends_target, ", ".join(file.ends))
    elif file.ends:
        logger.info("sd-scripts has no place for %s; the rest it reads", ", ".join(file.ends))
    if file.has_biases:
        logger.info("diffusers refuses this file, because it holds biases; --ends apart writes a second")


def _export_checkpoint_file(config: CheckpointFileExportConfig) -> None:
    from d2f_core.model.single_file.write import write_checkpoint_file

    model = _model_files(config)
    done = write_checkpoint_file(
        model,
        config.output,
        base_uri=config.base or None,
        base_prediction=config.base_prediction,
        dtype=config.dtype,
        title=config.title,
    )
    told = "a rectified flow (sd3)" if done.prediction == "sd3" else done.prediction
    logger.info("wrote %s: %s, %d tensors, %.2f GB, %s", done.target, done.family, done.keys, done.size / 1e9, told)
    _say_how_captions_are_read(model)
    if done.prediction == "sd3":
        logger.info("ComfyUI needs the node ModelSamplingSD3 behind the checkpoint's loader; SwarmUI sets it by itself")


def _say_how_captions_are_read(model: str) -> None:
    """Say what other programs do not do by themselves."""
    from d2f_core.model.base import described_copy
    from d2f_core.model.caption_rules import read_rules, told_to_others
    from d2f_core.model.description import DESCRIPTION, read_description

    directory = described_copy(model).path
    if (directory / DESCRIPTION).is_file() and (told := told_to_others(read_rules(read_description(directory)))):
        logger.warning("the model reads captions otherwise than other programs do. %s", told)


if __name__ == "__main__":
    run_job("export", RECIPES, main, check)
