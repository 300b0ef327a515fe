"""An SDXL base model with every part in diffusers' layout, small enough to sample in milliseconds; weights are random.

Two CLIP text encoders as SDXL has them (77 tokens; quick_gelu and gelu; the second projects, is padded with "!" and
keeps the old `eos_token_id` 2), tokenizers that know single letters and one merge, an 8-fold autoencoder.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_core.model.published_names import with_published_names
from tests.model.architectures import tiny_unet

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "!,abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "at</w>", START, END]
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.1",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_tokenizer(directory: Path, pad: str) -> None:
    """The files of the original model: vocab.json, merges.txt, tokenizer_config.json."""
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(VOCABULARY)}))
    (directory / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(names))


def text_config(width: int, activation: str, **more: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        **more,
    )


def write_vae(directory: Path, **config: float) -> None:
    """An 8-fold autoencoder."""
    AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    ).save_pretrained(directory)


def write_tiny_sdxl(path: Path, *, zeros_for_empty: bool | None = True) -> Path:
    """64 px images, latents 4x8x8; `zeros_for_empty` None leaves it out of model_index.json."""
    tiny_unet("sdxl").save_pretrained(path / "unet")
    torch.manual_seed(1)
    CLIPTextModel(text_config(8, "quick_gelu")).save_pretrained(path / "text_encoder")
    with_published_names(path / "text_encoder")
    second = CLIPTextModelWithProjection(text_config(12, "gelu", projection_dim=24))
    second.save_pretrained(path / "text_encoder_2")
    write_tokenizer(path / "tokenizer", END)
    write_tokenizer(path / "tokenizer_2", "!")
    write_vae(path / "vae", scaling_factor=0.13025, force_upcast=True)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(path / "scheduler")
    index = {**INDEX, "force_zeros_for_empty_prompt": zeros_for_empty}
    if zeros_for_empty is None:
        del index["force_zeros_for_empty_prompt"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path
