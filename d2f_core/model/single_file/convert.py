"""From a file in Stable Diffusion's original layout to a directory in diffusers', one tensor at a time.

Configs, scheduler and tokenizer settings are those of the family, shipped in `configs/`; they are part of what a base
model is identified by, so they never change. The weights keep the file's dtypes.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from d2f_core.model.safetensors_header import HeaderError, TensorHeader, read_header
from d2f_core.model.single_file.family import SD21, TEXT_MODEL, Family, Part, family_of_keys, read_parts
from d2f_core.model.single_file.keys import AUTOENCODER, UNET, LayoutError
from d2f_core.model.single_file.prediction import FLOW, Prediction, read_prediction
from d2f_core.model.single_file.tensor_file import TensorReader, writing
from d2f_core.model.single_file.vocabulary import clip_merges, write_vocabulary

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
CONFIG_SUFFIXES = (".json", ".txt", ".model")
FLOATS = ("float32", "float16", "bfloat16")
FLOW_SHIFT = 3.0
"""Of a flow model whose file names none: the default of the programs that sample such files."""
FIRST_LAYER = f"{UNET}input_blocks.0.0.weight"
OLDER_CLIP = re.compile(r"(cond_stage_model\.transformer\.)((embeddings|encoder|final_layer_norm)\..*)")
"""Keys of early SD 1 checkpoints, which lack a part of the name."""
UNREAD = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|denoiser\.sigmas|v_pred|ztsnr|scale_factor|logvar"
    r"|betas|\w*alphas_cumprod\w*|posterior_\w+"
    r"|(cond_stage_model|conditioner)\..*(position_ids|logit_scale|attn_mask|text_projection(\.weight)?)"
)
"""Keys beside the networks' that published files hold: averaged weights, the noise schedule, buffers."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file that was found to hold a whole model, told by its header."""

    family: Family
    parts: Sequence[Part]
    prediction: Prediction
    headers: Mapping[str, TensorHeader]
    """By the family's names of the tensors, of which the file may have older ones."""
    keys: Mapping[str, str]
    """The family's name of a tensor -> the file's."""
    reader: TensorReader


def examine(file: Path, configs: Path | None = None) -> Checkpoint:
    """Check a file by its header; of the rest only the size has to be right.

    Args:
        configs: directory with the model's own configs, scheduler and tokenizers; None: those of its family.

    Raises:
        LayoutError: the file is damaged, or no whole checkpoint of a known family; the reason and the fix, which
            follow the file's name.
    """
    try:
        header, reader = read_header(file), TensorReader([file])
    except (HeaderError, SafetensorError) as error:
        raise LayoutError(str(error)) from None
    keys = {OLDER_CLIP.sub(rf"\1{TEXT_MODEL}\2", key): key for key in header}
    headers = {name: header[key] for name, key in keys.items()}
    family = family_of_keys(keys)
    parts = read_parts(configs or CONFIGS / family.name, family)
    prediction = read_prediction(reader.metadata, keys, family)
    _check(headers, parts, family)
    return Checkpoint(family=family, parts=parts, prediction=prediction, headers=headers, keys=keys, reader=reader)


def convert(file: Path, target: Path, configs: Path | None = None) -> Checkpoint:
    """Write the directory `target` in diffusers' layout; arguments and errors as of `examine`."""
    found = examine(file, configs)
    logger.info("%s: %s, %s by %s", file.name, found.family.title, found.prediction.kind, found.prediction.told_by)
    if any(key.startswith("model_ema.") for key in found.keys):
        logger.warning("%s also holds averaged weights (model_ema.), which are not read", file.name)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed conversion left; each target is made by one at a time
    partial.parent.mkdir(parents=True, exist_ok=True)
    write_configs(partial, found, configs)
    for part in found.parts:
        _write_part(partial / part.directory, part, found.headers, found.keys, found.reader)
    partial.rename(target)
    return found


def _check(headers: Mapping[str, TensorHeader], parts: Sequence[Part], family: Family) -> None:
    """Raise LayoutError unless the file holds all networks, in the configs' shapes, and nothing unknown."""
    wanted = {entry.key: part.key_shape(entry) for part in parts for entry in part.entries}
    if not any(key.startswith(AUTOENCODER) for key in headers):
        raise LayoutError(f"holds no autoencoder ({AUTOENCODER}). Give the whole checkpoint.")
    channels, found = wanted[FIRST_LAYER][1], headers.get(FIRST_LAYER)
    if found and len(found.shape) == 4 and found.shape[1] != channels:
        raise LayoutError(
            f"holds a UNet with {found.shape[1]} input channels, as models for inpainting or depth have. Give one "
            f"from text to image, with {channels}."
        )
    title, fix = family.title, "or put the configs of its networks into a directory NAME.configs beside it."
    if missing := sorted(wanted.keys() - headers.keys()):
        raise LayoutError(
            f"lacks {len(missing)} tensors of {title}, such as {missing[:2]}. Give the whole checkpoint, {fix}"
        )
    if unknown := _unknown(headers, wanted, family):
        raise LayoutError(
            f"holds {len(unknown)} tensors that {title} has not, such as {unknown[:2]}. Give one without them, {fix}"
        )
    for key, shape in wanted.items():
        if headers[key].dtype not in FLOATS:
            raise LayoutError(f"holds {key!r} as {headers[key].dtype}. Give one in {', '.join(FLOATS)}.")
        if not _same_shape(headers[key].shape, tuple(shape)):
            raise LayoutError(
                f"holds {key!r} in the shape {list(headers[key].shape)}; {title} has {list(shape)}. Give another, {fix}"
            )


def _same_shape(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether shapes agree; some programs write 1x1 convolutions of the autoencoder as matrices."""
    return found == wanted or (len(found) == 2 and (*found, 1, 1) == wanted)


def _unknown(headers: Collection[str], wanted: Collection[str], family: Family) -> list[str]:
    """The keys that no network has, and no published file either.

    SD 2.1 reads OpenCLIP's last layer but one, so that the last one has no place in diffusers' layout.
    """
    left = [key for key in headers if key not in wanted and not UNREAD.fullmatch(key)]
    if family is SD21:
        layers = {found[1] for key in wanted if (found := re.search(r"\.resblocks\.(\d+)\.", key))}
        left = [key for key in left if f".resblocks.{len(layers)}." not in key]
    return sorted(left)


def write_configs(made: Path, found: Checkpoint, own: Path | None) -> None:
    """Write configs, scheduler and tokenizers; parts that a model brings along itself (`own`) are taken as they are."""
    shutil.copytree(CONFIGS / found.family.name, made)
    scheduler = scheduler_config(_read_json(made / SCHEDULER), found.prediction, found.reader.metadata)
    index = {**_read_json(made / INDEX), "scheduler": ["diffusers", scheduler["_class_name"]]}
    _write_json(made / SCHEDULER, scheduler)
    _write_json(made / INDEX, index)
    if own:
        _copy_configs(own, made)
    for encoder in found.family.encoders:
        tokenizer = made / encoder.part.replace("text_encoder", "tokenizer")
        if not any((tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            write_vocabulary(tokenizer, clip_merges())


def scheduler_config(before: dict[str, Any], prediction: Prediction, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A scheduler config with what is known of the network.

    Args:
        metadata: of the file, where a flow model's shift may stand.
    """
    if prediction.kind == FLOW:
        # Stock pipelines can sample a flow model by this scheduler; FlowMatchEulerDiscreteScheduler fails in them. The
        # family's noise levels stay, for whoever says that the network is no flow after all.
        return {
            **{name: before[name] for name in ("beta_schedule", "beta_start", "beta_end") if name in before},
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "solver_order": 1,
            "num_train_timesteps": 1000,
            "prediction_type": FLOW,
            "use_flow_sigmas": True,
            "flow_shift": float(metadata.get("d2f_shift", FLOW_SHIFT)),
        }
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if prediction.zero_snr else {}
    return {**before, "prediction_type": prediction.kind, **zero_snr}


def _copy_configs(own: Path, made: Path) -> None:
    """Replace each part that `own` has, by its configs and vocabularies alone."""
    for part in own.iterdir():
        if part.is_dir():
            shutil.rmtree(made / part.name, ignore_errors=True)
    for file in own.rglob("*"):
        if file.suffix in CONFIG_SUFFIXES and not file.name.endswith(".index.json"):
            target = made / file.relative_to(own)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_part(
    directory: Path, part: Part, headers: Mapping[str, TensorHeader], keys: Mapping[str, str], reader: TensorReader
) -> None:
    """Write a network's weights; the tensors of an entry have the dtype that it has in the file."""
    dtypes = {name: headers[entry.key].dtype for entry in part.entries for name in entry.names}
    shapes = {part.saved(name): (dtypes[name], tuple(part.shapes[name])) for name in part.shapes}
    with writing(directory / part.file, shapes, {"format": "pt"}) as writer:
        for entry in part.entries:
            for name, tensor in zip(entry.names, entry.part(reader(keys[entry.key])), strict=True):
                writer.write(part.saved(name), tensor)
