"""A base with every part of Stable Diffusion, and what a stock pipeline makes of an export of it."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from d2f_core.model.published_names import with_published_names
from tests.flow.tiny_base import MAX_LENGTH, TEXT_WIDTH, write_tiny_base
from tests.model.artifacts import NOISE, NULL, STATES


def write_complete_base(path: Path) -> Path:
    """Its CLIP text encoder and tokenizer know single letters."""
    write_tiny_base(path)
    (path / "text_encoder/reference.json").unlink()
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_LENGTH).save_pretrained(path / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(path / "text_encoder")
    with_published_names(path / "text_encoder")
    (path / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "_diffusers_version": "0.42.1",
                "feature_extractor": ["transformers", "CLIPImageProcessor"],
                "requires_safety_checker": False,
                "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
        )
    )
    return path


@torch.no_grad()
def latents_of(pipeline, steps: int, guidance: float) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=STATES,
        negative_prompt_embeds=NULL,
        latents=NOISE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images
