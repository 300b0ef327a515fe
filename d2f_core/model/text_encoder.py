"""Captions to the UNet's text conditions, by the base model's own text encoders.

| base           | condition by the denoiser's argument names                                                       |
|----------------|--------------------------------------------------------------------------------------------------|
| SD 1.5, SD 2.1 | text_states [batch, tokens, width]: the encoder's last hidden states                             |
| SDXL           | text_states: the last but one hidden states of two encoders, side by side; pooled_text [batch,   |
|                | width]: the second one's projected text                                                          |

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
from torch import Tensor

from d2f_core.file_systems import read_or_map
from d2f_core.hashing import hash_directory
from d2f_core.model.base import SDXL_PARTS, BaseModel, BaseModelError, is_sdxl
from d2f_core.model.fit import (
    Misfit,
    automatic_on_meta,
    require_fit,
    require_safetensors,
    silent_transformers,
    transformers_on_meta,
)
from d2f_core.model.weight_files import TRANSFORMERS_NAME, variant_argument


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder; every caption gives the same number of tokens."""

    network: Any
    tokenizer: Any
    max_length: int
    """Tokens per caption; longer captions are truncated."""
    masked: bool
    """Whether padding is masked in the encoder and zero in its output. CLIP was trained with unmasked padding."""
    fingerprint: str

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Text states, float32 [len(captions), max_length, width]."""
        tokens = _tokens(self.tokenizer, captions, self.max_length).to(self.network.device)
        if not self.masked:
            return self.network(tokens.input_ids).last_hidden_state.float()
        states = self.network(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float()
        return states * tokens.attention_mask[..., None]

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`text_states`, float32 [len(captions), max_length, width]."""
        return {"text_states": self.encode(captions)}


@dataclass(frozen=True)
class TextEncoderPair:
    """SDXL's two frozen CLIP text encoders; both read the whole caption."""

    networks: tuple[Any, Any]
    tokenizers: tuple[Any, Any]
    max_length: int
    """Tokens per caption; longer captions are truncated."""
    zeros_for_empty: bool
    """Whether the empty caption gives zeros: `force_zeros_for_empty_prompt` in model_index.json, true when not given.

    It holds wherever a caption is empty: dropped captions in training, empty and negative prompts in sampling. So the
    unconditional half of guidance is the one that was trained. (diffusers uses zeros when no negative prompt is given,
    but encodes an empty string that is given as one.)
    """
    fingerprint: str

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Only the text states, float32 [len(captions), max_length, sum of both widths]."""
        return self.condition(captions)["text_states"]

    @torch.inference_mode()
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`text_states` and `pooled_text`, float32 [len(captions), ...]."""
        states, pooled = [], None
        for network, tokenizer in zip(self.networks, self.tokenizers, strict=True):
            # Padding is not masked in either encoder, as in their training; the second one pads with "!".
            tokens = _tokens(tokenizer, captions, self.max_length).to(network.device)
            output = network(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2].float())
            pooled = output.get("text_embeds")
        assert pooled is not None
        condition = {"text_states": torch.cat(states, -1), "pooled_text": pooled.float()}
        empty = [index for index, caption in enumerate(captions) if not caption]
        if self.zeros_for_empty and empty:
            for value in condition.values():
                value[empty] = 0
        return condition


@dataclass(frozen=True, kw_only=True)
class DescribedTextEncoder:
    """A base model's text encoder without its weights; for SDXL both encoders."""

    kinds: tuple[Any, ...]
    """The networks' classes of transformers."""
    directories: tuple[Path, ...]
    tokenizers: tuple[Any, ...]
    max_length: int
    masked: bool = False
    zeros_for_empty: bool = False
    determined_by: Callable[[], Sequence[object]]
    """Everything that the captions' states depend on; reads the weights' files to hash them."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the captions' states depend on, which reads all files.

        Raises:
            UnreachableError: S3, where the files of a described base lie, stays away.
        """
        return hashlib.sha256(" ".join(map(str, self.determined_by())).encode()).hexdigest()


def _tokens(tokenizer: Any, captions: Sequence[str], max_length: int) -> Any:
    return tokenizer(list(captions), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")


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
        return TextEncoder(networks[0], tokenizers[0], length, described.masked, fingerprint)
    pair, both = (networks[0], networks[1]), (tokenizers[0], tokenizers[1])
    return TextEncoderPair(pair, both, length, described.zeros_for_empty, fingerprint)


def describe_text_encoder(base: BaseModel) -> DescribedTextEncoder:
    """All of the base model's text encoder but its weights, whose headers are compared with its config.

    Raises:
        BaseModelError: the base model has no text encoder, its files are damaged or of another network, the encoder
            does not fit the UNet, or the package that the base model names is not installed.
    """
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
