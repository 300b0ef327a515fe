"""Captions to text states [batch, tokens, width], by the base model's own text encoder.

A base model that uses an encoder shipped as a Python package names it in `text_encoder/reference.json`
(`{"package": ..., "subdirectory": ..., "max_length": ...}`) instead of carrying its weights.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2f_core.content import hash_directory
from d2f_core.model.base import BaseModel, BaseModelError


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder; every caption gives the same number of tokens."""

    network: Any
    tokenizer: Any
    max_length: int
    """Tokens per caption; longer captions are cut."""
    masked: bool
    """Whether padding is hidden from the encoder and put out as zeros. CLIP was trained with it in sight."""
    fingerprint: str

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Float32 [len(captions), max_length, width]."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        ).to(self.network.device)
        if not self.masked:
            return self.network(tokens.input_ids).last_hidden_state.float()
        states = self.network(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float()
        return states * tokens.attention_mask[..., None]


def _referenced(base: BaseModel) -> tuple[Path, dict[str, Any]]:
    reference = json.loads((base.path / "text_encoder/reference.json").read_text())
    spec = importlib.util.find_spec(reference["package"])
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"{base.uri!r} uses the text encoder of the Python package {reference['package']!r}, which is not "
            "installed. Install diff2flow-ray[demo]."
        )
    return Path(spec.origin).parent / reference["subdirectory"], reference


def load_text_encoder(base: BaseModel, *, device: str | torch.device = "cpu") -> TextEncoder:
    """The base model's text encoder, frozen, from disk alone.

    Raises:
        BaseModelError: the base model has none, or the package that it names is missing.
    """
    from transformers import AutoModel, AutoTokenizer, CLIPTextModel, CLIPTokenizer

    if (base.path / "text_encoder/reference.json").is_file():
        directory, reference = _referenced(base)
        network = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        max_length, masked, fingerprint = int(reference["max_length"]), True, hash_directory(directory)
    elif (base.path / "text_encoder/config.json").is_file():
        directory = base.path / "text_encoder"
        network: Any = CLIPTextModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(base.path / "tokenizer", local_files_only=True)
        max_length, masked, fingerprint = int(tokenizer.model_max_length), False, hash_directory(directory)
    else:
        raise BaseModelError(
            f"{base.uri!r} has no text_encoder/config.json. Copy that directory of the original model."
        )
    digest = hashlib.sha256(f"{fingerprint} {max_length}".encode()).hexdigest()
    return TextEncoder(network.to(device).eval().requires_grad_(False), tokenizer, max_length, masked, digest)
