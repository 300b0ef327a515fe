"""Copies the parts of a base model in diffusers' layout to another pipeline directory, and reports missing ones.

model_index.json maps each part to [library, class], or to [null, null] where the directory has none.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers

from d2f_core.hashing import HASHED_SUFFIXES
from d2f_core.model.base import PARTS, SDXL_PARTS, is_sdxl
from d2f_core.model.published_names import with_published_names
from d2f_core.model.weight_files import NAMES, with_plain_names

MODEL_INDEX = "model_index.json"
CLASS_FIELDS = (
    ("config.json", "_class_name", "diffusers"),
    ("config.json", "architectures", "transformers"),
    ("tokenizer_config.json", "tokenizer_class", "transformers"),
    ("preprocessor_config.json", "image_processor_type", "transformers"),
)
"""(config file of a part, field that names its class, library of that class)"""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON file's contents; empty when the file does not exist."""
    return json.loads(file.read_text()) if file.is_file() else {}


def copy_part(source: Path, target: Path) -> None:
    """Copy configs, safetensors and vocabularies, but no file that could run code when loaded (pickles, Python)."""
    for file in source.rglob("*"):
        if file.is_file() and file.suffix in HASHED_SUFFIXES:
            copied = target / file.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)


def _loadable(part: Path) -> bool:
    """Whether diffusers can load the part: a tokenizer or feature extractor, or a network with safetensors."""
    if any((part / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json")):
        return True
    return (part / "config.json").is_file() and any(part.glob("*.safetensors"))


def _class_of(part: Path) -> list[str] | None:
    """[library, class] from the part's own config; None if the config does not name them."""
    for file, field, library in CLASS_FIELDS:
        if value := read_json(part / file).get(field):
            return [library, value if isinstance(value, str) else value[0]]
    return None


def _why_missing(part: Path) -> str:
    if (part / "reference.json").is_file():
        package = read_json(part / "reference.json").get("package")
        return f"the base refers to the Python package {package!r} instead of carrying it"
    return "the base has it without safetensors" if (part / "config.json").is_file() else "the base has none"


def copy_base_parts(base: Path, target: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Copy all parts of a base except its UNet and scheduler.

    Returns:
        The contents of model_index.json (with the base's pipeline class, without UNet and scheduler), and each missing
        part with the reason. The existing files of an incomplete part are copied too. Tensors get their published
        names.
    """
    pair = is_sdxl(read_json(base / "unet/config.json"))
    kind = "StableDiffusionXLPipeline" if pair else "StableDiffusionPipeline"
    index: dict[str, Any] = {"_class_name": kind, **read_json(base / MODEL_INDEX)}
    index.pop("_name_or_path", None)  # a local path of the machine that saved it
    index["_diffusers_version"] = diffusers.__version__
    named = [name for name, value in index.items() if isinstance(value, list)]
    missing = {}
    for name in dict.fromkeys([*named, *PARTS, *(SDXL_PARTS if pair else ())]):
        part, entry = base / name, index.pop(name, None)
        if name in ("unet", "scheduler"):
            continue
        if part.is_dir():
            copy_part(part, target / name)
            if name in NAMES:
                with_plain_names(target / name, NAMES[name])
            with_published_names(target / name)
        if entry and entry[0] is None:
            index[name] = entry
        elif _loadable(part) and (entry := entry or _class_of(part)):
            index[name] = entry
        else:
            index[name], missing[name] = [None, None], _why_missing(part)
    return index, missing
