"""A base model as large as a real one that takes no room: headers are true, and the tensors are a hole in the file."""

import json
import os
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler
from torch import nn

from d2f_core.model.architectures import KNOWN
from d2f_core.safetensors_layout import layout
from tests.model.tiny_sdxl import END, INDEX, write_tokenizer


def write_sparse_weights(file: Path, network: nn.Module, dtype: str = "float16") -> None:
    """The weights of a network, all zeros."""
    tensors = {name: (dtype, tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    made = layout(tensors, {"format": "pt"})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(made.header)
    os.truncate(file, made.size)


def write_sparse_sdxl(path: Path, dtype: str = "float16") -> Path:
    """SDXL: 5.1 GB of UNet in float16, 1.6 GB of text encoders."""
    with torch.device("meta"):
        unet, vae, encoders = KNOWN["sdxl"].build_unet(), KNOWN["sdxl"].build_vae(), KNOWN["sdxl"].build_text_encoders()
    for part, network in (("unet", unet), ("vae", vae)):
        network.save_config(path / part)
        write_sparse_weights(path / part / "diffusion_pytorch_model.safetensors", network, dtype)
    for part, network in zip(("text_encoder", "text_encoder_2"), encoders, strict=True):
        network.config.save_pretrained(path / part)
        write_sparse_weights(path / part / "model.safetensors", network, dtype)
    write_tokenizer(path / "tokenizer", END)
    write_tokenizer(path / "tokenizer_2", "!")
    EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        path / "scheduler"
    )
    (path / "model_index.json").write_text(json.dumps(INDEX))
    return path
