"""Captions to the UNet's text conditions, by the base model's own text encoders.

| base           | condition by the denoiser's argument names                                                       |
|----------------|--------------------------------------------------------------------------------------------------|
| SD 1.5, SD 2.1 | text_states [batch, tokens, width]: the encoder's last hidden states                             |
| SDXL           | text_states: the last but one hidden states of two encoders, side by side; pooled_text [batch,   |
|                | width]: the second one's projected text                                                          |

How captions are read is part of how a base is read (`BaseModel.captions`): a trained model's base reads them by the
rules that the model was trained by. `d2f_core.model.caption_encoders` has the loaded encoders.

A base model that uses an encoder shipped as a Python package names it in `text_encoder/reference.json`
(`{"package": ..., "subdirectory": ..., "max_length": ...}`) instead of carrying its weights.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from d2f_core.file_systems import read_or_map
from d2f_core.hashing import hash_directory
from d2f_core.model.base import SDXL_PARTS, BaseModel, BaseModelError, is_sdxl
from d2f_core.model.caption_encoders import TextEncoder, TextEncoderPair
from d2f_core.model.caption_rules import DEFAULT, CaptionRules
from d2f_core.model.fit import (
    Misfit,
    automatic_on_meta,
    require_fit,
    require_safetensors,
    silent_transformers,
    transformers_on_meta,
)
from d2f_core.model.weight_files import TRANSFORMERS_NAME, variant_argument


@dataclass(frozen=True, kw_only=True)
class DescribedTextEncoder:
    """A base model's text encoder without its weights; for SDXL both encoders."""

    kinds: tuple[Any, ...]
    """The networks' classes of transformers."""
    directories: tuple[Path, ...]
    tokenizers: tuple[Any, ...]
    max_length: int
    """Tokens per chunk of a caption."""
    masked: bool = False
    zeros_for_empty: bool = False
    spare_layers: int = 0
    """Most layers that `clip_skip` may leave out."""
    rules: CaptionRules = DEFAULT
    determined_by: Callable[[], Sequence[object]]
    """Everything that the captions' states depend on; reads the weights' files to hash them."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the captions' states depend on, which reads all files.

        Raises:
            UnreachableError: S3, where the files of a described base lie, stays away.
        """
        rules = () if self.rules == DEFAULT else (self.rules,)
        return hashlib.sha256(" ".join(map(str, (*self.determined_by(), *rules))).encode()).hexdigest()

    @property
    def read_at_most(self) -> int:
        """Tokens of a caption that are read, without those of begin and end."""
        return self.rules.chunks * (self.max_length - self.tokenizers[0].num_special_tokens_to_add())

    def cut_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many tokens of each caption are not read, because it is longer than its chunks; by the first tokenizer
        (SDXL's two cut alike).
        """
        if not captions:
            return []
        # Not "verbose": transformers would warn of the length itself, once and without a number of captions.
        found = self.tokenizers[0](list(captions), add_special_tokens=False, verbose=False)["input_ids"]
        return [max(0, len(tokens) - self.read_at_most) for tokens in found]


def _referenced(base: BaseModel) -> tuple[Path, dict[str, Any]]:
    reference = json.loads((base.path / "text_encoder/reference.json").read_text())
    if not str(reference["package"]).isidentifier():  # looking up a submodule would import its package
        raise BaseModelError(
            f"{base.uri!r} names the text encoder's package {reference['package']!r}. It must be the plain name of an "
            "installed package: correct text_encoder/reference.json."
        )
    spec = importlib.util.find_spec(reference["package"])
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"{base.uri!r} uses the text encoder of the Python package {reference['package']!r}, which is not "
            "installed. Install diff2flow-ray[demo]."
        )
    return Path(spec.origin).parent / reference["subdirectory"], reference


def load_text_encoder(base: BaseModel, *, device: str | torch.device = "cpu") -> TextEncoder | TextEncoderPair:
    """The base model's text encoder (for SDXL both), frozen, loaded from local files only.

    Raises:
        BaseModelError: see `describe_text_encoder`.
    """
    base.files.require_whole()
    described = describe_text_encoder(base)
    networks = []
    for kind, directory in zip(described.kinds, described.directories, strict=True):
        options = {
            "local_files_only": True,
            "dtype": torch.float32,
            "use_safetensors": True,
            "variant": variant_argument(directory, TRANSFORMERS_NAME),
            **read_or_map(directory),
        }
        with silent_transformers():
            network = kind.from_pretrained(directory, **options)
        networks.append(network.to(device).eval().requires_grad_(False))
    tokenizers, length, fingerprint = described.tokenizers, described.max_length, described.fingerprint
    if len(networks) == 1:
        return TextEncoder(networks[0], tokenizers[0], length, described.masked, fingerprint, base.captions)
    pair, both = (networks[0], networks[1]), (tokenizers[0], tokenizers[1])
    return TextEncoderPair(pair, both, length, described.zeros_for_empty, fingerprint, base.captions)


def describe_text_encoder(base: BaseModel) -> DescribedTextEncoder:
    """All of the base model's text encoder but its weights, whose headers are compared with its config.

    Raises:
        BaseModelError: the base model has no text encoder, its files are damaged or of another network, the encoder
            does not fit the UNet, it has fewer layers than the base's captions leave out, or the package that the base
            model names is not installed.
    """
    described = _describe(base)
    if base.captions.clip_skip > described.spare_layers:
        raise BaseModelError(
            f"{base.uri!r} is asked for captions with clip_skip={base.captions.clip_skip}, and of its text encoder at "
            f"most {described.spare_layers} layers can be left out. Give captions.clip_skip in that range."
        )
    return replace(described, rules=base.captions)


def _describe(base: BaseModel) -> DescribedTextEncoder:
    unet_config = json.loads((base.path / "unet/config.json").read_text())
    if is_sdxl(unet_config):
        return _describe_pair(base, unet_config)
    if (base.path / "text_encoder/reference.json").is_file():
        return _describe_referenced(base)
    from transformers import CLIPTextModel

    directory = _encoder_directory(base, "text_encoder")
    config = _require_weights(base, "text_encoder", CLIPTextModel)
    tokenizer = _tokenizer(base, "tokenizer")
    length = _length(tokenizer, config)
    return DescribedTextEncoder(
        kinds=(CLIPTextModel,),
        directories=(directory,),
        tokenizers=(tokenizer,),
        max_length=length,
        spare_layers=config.num_hidden_layers - 1,
        determined_by=lambda: (_hash(base, directory), length),
    )


def _describe_referenced(base: BaseModel) -> DescribedTextEncoder:
    from transformers import AutoModel, AutoTokenizer

    directory, reference = _referenced(base)
    place = f"the package {reference['package']!r}, named by text_encoder"
    require_fit(base, place, partial(_referenced_misfit, directory))
    length = int(reference["max_length"])
    return DescribedTextEncoder(
        kinds=(AutoModel,),
        directories=(directory,),
        tokenizers=(AutoTokenizer.from_pretrained(directory, local_files_only=True),),
        max_length=length,
        masked=True,
        determined_by=lambda: (hash_directory(directory), length),
    )


def _referenced_misfit(directory: Path) -> Misfit:
    found = automatic_on_meta(directory)[1]
    # Only hidden states are read, which the pooler does not make.
    return replace(found, missing=tuple(name for name in found.missing if not name.startswith("pooler.")))


def _describe_pair(base: BaseModel, unet_config: dict[str, Any]) -> DescribedTextEncoder:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts, kinds = ("text_encoder", "text_encoder_2"), (CLIPTextModel, CLIPTextModelWithProjection)
    directories = tuple(_encoder_directory(base, part) for part in parts)
    configs = tuple(_require_weights(base, part, kind) for part, kind in zip(parts, kinds, strict=True))
    tokenizers = tuple(_tokenizer(base, part) for part in ("tokenizer", "tokenizer_2"))
    lengths = [_length(tokenizer, config) for tokenizer, config in zip(tokenizers, configs, strict=True)]
    _check_fit(base, unet_config, configs, lengths)
    zeros = _zeros_for_empty(base)
    return DescribedTextEncoder(
        kinds=kinds,
        directories=directories,
        tokenizers=tokenizers,
        max_length=lengths[0],
        zeros_for_empty=zeros,
        # One fewer than of SD's, because SDXL reads the last but one by itself.
        spare_layers=max(0, min(config.num_hidden_layers for config in configs) - 2),
        determined_by=lambda: (*(_hash(base, directory) for directory in directories), lengths[0], zeros),
    )


def _tokenizer(base: BaseModel, part: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(base.path / part, local_files_only=True)


def _length(tokenizer: Any, config: Any) -> int:
    """Tokens per caption: as many as the tokenizer says, which says 1e30 if its config names none, and at most as many
    as the encoder has positions for.
    """
    return min(int(tokenizer.model_max_length), config.max_position_embeddings)


def _hash(base: BaseModel, directory: Path) -> str:
    return hash_directory(directory, sha256=base.files.sha256)


def _encoder_directory(base: BaseModel, part: str) -> Path:
    if not (base.path / part / "config.json").is_file():
        raise BaseModelError(f"{base.uri!r} has no {part}/config.json. Copy that directory of the original model.")
    require_safetensors(base, part, f"transformers.CLIPTextModel{'WithProjection' if part == SDXL_PARTS[0] else ''}")
    return base.path / part


def _require_weights(base: BaseModel, part: str, kind: Any) -> Any:
    """The config of a base's text encoder, after a comparison with the headers of its files."""
    directory = base.path / part
    config = kind.config_class.from_pretrained(directory, local_files_only=True)
    require_fit(base, part, lambda: transformers_on_meta(kind, config, directory)[1])
    return config


def _check_fit(base: BaseModel, unet_config: dict[str, Any], encoders: tuple[Any, ...], lengths: list[int]) -> None:
    """Raise BaseModelError if the encoders' widths differ from those that the UNet reads, or their token numbers
    differ.
    """
    widths, pooled = [config.hidden_size for config in encoders], encoders[1].projection_dim
    wanted = unet_config["cross_attention_dim"]
    wanted_pooled = unet_config["projection_class_embeddings_input_dim"] - 6 * unet_config["addition_time_embed_dim"]
    if (sum(widths), pooled) != (wanted, wanted_pooled) or lengths[0] != lengths[1]:
        raise BaseModelError(
            f"{base.uri!r} has text encoders of widths {widths} with {lengths} tokens and a pooled text of width "
            f"{pooled}, but its UNet reads text states of width {wanted}, equally many tokens of both, and a pooled "
            f"text of width {wanted_pooled}. Copy text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/ of the "
            "model that the UNet belongs to."
        )


def _zeros_for_empty(base: BaseModel) -> bool:
    index = base.path / "model_index.json"
    content = json.loads(index.read_text()) if index.is_file() else {}
    return bool(content.get("force_zeros_for_empty_prompt", True))
