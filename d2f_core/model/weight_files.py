"""The files of a network's weights: one or shards, under the plain name or, if there is none, that of a variant.

Published directories hold several: `diffusion_pytorch_model.safetensors`, `.fp16.safetensors` beside it in half
precision, `.non_ema.safetensors` without averaging, each as one file or as shards with an index. The plain one is
read; where somebody copied a variant alone, that is.
"""

import logging
import re
from pathlib import Path

from d2f_core.model.plain_json import NotPlainError, parse
from d2f_core.model.safetensors_header import HeaderError

logger = logging.getLogger(__name__)

DIFFUSERS_NAME, TRANSFORMERS_NAME = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""The files that the libraries load from a network's directory; with a name + `.index.json`, its shards."""
NAMES = {
    "unet": DIFFUSERS_NAME,
    "vae": DIFFUSERS_NAME,
    "text_encoder": TRANSFORMERS_NAME,
    "text_encoder_2": TRANSFORMERS_NAME,
}
"""Part of a base -> plain name of its weights."""
PREFERRED = ("fp32", "ema", "fp16", "bf16", "non_ema")
"""Variants, the best first; others follow by name."""
CONFIGS = re.compile(r"(unet|vae|text_encoder(_2)?)/(config|reference)\.json|scheduler/scheduler_config\.json")
VOCABULARIES = re.compile(
    r"tokenizer(_2)?/((vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|(merges|vocab)\.txt|\w+\.model)"
)


def variant_of(directory: Path, name: str) -> str:
    """The variant of a network's weights that is loaded; empty: the plain one, or there are no weights.

    Args:
        name: the plain file's name.
    """
    if (directory / name).is_file() or (directory / f"{name}.index.json").is_file():
        return ""
    stem = re.escape(name.removesuffix(".safetensors"))
    named = re.compile(rf"{stem}\.([A-Za-z]\w*)\.safetensors|{stem}\.safetensors\.index\.([A-Za-z]\w*)\.json")
    found = {match[1] or match[2] for file in directory.glob("*") if (match := named.fullmatch(file.name))}
    known = [variant for variant in PREFERRED if variant in found]
    return next(iter([*known, *sorted(found)]), "")


def variant_argument(directory: Path, name: str) -> str | None:
    """The `variant` of the libraries' `from_pretrained`, with a line in the log when there is one."""
    if variant := variant_of(directory, name):
        logger.info("%s has its weights as variant %s alone, which is loaded", directory, variant)
    return variant or None


def shard_names(directory: Path, name: str) -> list[str]:
    """Names of the files that hold a network's weights, of which one alone may be missing.

    Raises:
        HeaderError: the list of shards is damaged.
    """
    index, single = _index_and_single(directory, name)
    if not (directory / index).is_file():
        return [single]
    try:
        shards = parse((directory / index).read_bytes()).get("weight_map")
    except NotPlainError as error:
        raise HeaderError(f"{directory.name}/{index} {error}") from None
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", each) for each in names):
        raise HeaderError(f"{directory.name}/{index} names no safetensors beside it. Copy the weights again.")
    return sorted(names)


def _index_and_single(directory: Path, name: str) -> tuple[str, str]:
    """Names of the list of shards and of the one file, of the variant that is loaded."""
    if not (variant := variant_of(directory, name)):
        return f"{name}.index.json", name
    return f"{name}.index.{variant}.json", f"{name.removesuffix('.safetensors')}.{variant}.safetensors"


def with_plain_names(directory: Path, name: str) -> None:
    """Rename the weights of a variant that is there alone, so that programs find them that ask for no variant."""
    if not variant_of(directory, name):
        return
    for variant, plain in zip(_index_and_single(directory, name), (f"{name}.index.json", name), strict=True):
        if (directory / variant).is_file():
            (directory / variant).replace(directory / plain)


def read_files(base: Path) -> set[str]:
    """Names of a base's files that are read when it is loaded; others may come and go."""
    found = {
        name
        for file in base.glob("*/*")
        if CONFIGS.fullmatch(name := file.relative_to(base).as_posix()) or VOCABULARIES.fullmatch(name)
    }
    for part, plain in NAMES.items():
        try:
            weights = shard_names(base / part, plain)
        except HeaderError:  # whoever loads them is told
            weights = []
        found |= {f"{part}/{each}" for each in (*weights, _index_and_single(base / part, plain)[0])}
    return found
