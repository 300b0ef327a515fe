"""What a pass takes is counted, and equals what real tensors take."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from d2f_core.model import footprint
from d2f_core.model.architectures import KNOWN, read_architecture
from d2f_core.model.base import BaseModelError
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import extend_input_channels
from d2f_core.model.lora import add_lora
from tests.model.architectures import FULL, tiny_unet
from tests.model.tiny_sdxl import write_tiny_sdxl


@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [
        ("sd15", 859_520_964, 123_060_480),
        ("sd21", 865_910_724, 340_387_840),
        ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840),
    ],
)
def test_the_known_architectures_have_the_published_numbers_of_parameters(name: str, unet: int, text: int):
    architecture = KNOWN[name]
    assert architecture.unet == FULL[name]
    with torch.device("meta"):
        built = architecture.build_unet(), architecture.build_vae(), architecture.build_text_encoders()
    assert sum(footprint.sizes(built[0], trained=True)) == unet
    assert sum(footprint.sizes(built[1], trained=True)) == 83_653_863
    assert sum(sum(footprint.sizes(encoder, trained=True)) for encoder in built[2]) == text


def test_an_architecture_is_read_from_the_configs_of_a_base_model(tmp_path):
    base = write_tiny_sdxl(tmp_path)
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    architecture = read_architecture(str(base))
    assert architecture.build_unet().config["cross_attention_dim"] == 20
    assert [type(encoder).__name__ for encoder in architecture.build_text_encoders()] == [
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ]
    with pytest.raises(BaseModelError, match=r"architecture='sd3' has no unet/config.json. Use sd15, sd21, sdxl"):
        read_architecture("sd3")


def test_a_stable_diffusion_2_1_pass_has_the_operations_that_were_counted_by_hand():
    with torch.device("meta"):
        unet = KNOWN["sd21"].build_unet().requires_grad_(True)
    counted = footprint.count_pass(unet, batch=1, side=64, dtype=torch.bfloat16)
    assert counted.forward_flops == pytest.approx(0.804e12, rel=0.001)
    # Twice the forward pass for the backward pass, and attention's scores again.
    assert 3 * counted.forward_flops < counted.flops < 3.1 * counted.forward_flops
    assert unet.conv_in.weight.is_meta and unet.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize(("name", "adapted"), [("sd15", True), ("sd21", False), ("sdxl", True)])
def test_bytes_and_operations_of_empty_tensors_are_those_of_real_ones(name: str, adapted: bool):
    unet = extend_input_channels(tiny_unet(name), 4) if name == "sd21" else tiny_unet(name)
    network = add_lora(unet, LoraConfig(preset="small")) if adapted else unet.requires_grad_(True)
    real = footprint.measure_pass(network.train(), footprint.unet_inputs(unet, 2, 16), torch.float32)
    assert footprint.count_pass(network, batch=2, side=16, dtype=torch.float32) == real
    assert 0 < real.held_bytes <= real.peak_bytes < 1.5 * real.held_bytes


def two_levels() -> UNet2DConditionModel:
    """Of SD 2.1's four: a pass takes Python's time, by the number of operations."""
    kinds = {
        "block_out_channels": (8, 16),
        "attention_head_dim": (1, 2),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return tiny_unet("sd21", **kinds).requires_grad_(True)


def test_activations_grow_with_the_batch_and_fall_to_half_the_bytes_in_bf16():
    unet = two_levels()
    one, three = (footprint.count_pass(unet, batch=size, side=16, dtype=torch.float32) for size in (1, 3))
    assert three.held_bytes == pytest.approx(3 * one.held_bytes, rel=0.02) and three.flops == 3 * one.flops
    half = footprint.count_pass(unet, batch=1, side=16, dtype=torch.bfloat16)
    assert half.held_bytes == pytest.approx(one.held_bytes / 2, rel=0.05) and half.flops == one.flops


def test_activation_checkpointing_holds_less_and_computes_more():
    unet = two_levels()
    plain, saving = (
        footprint.count_pass(unet, batch=1, side=16, dtype=torch.float32, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert saving.held_bytes < plain.held_bytes / 2 and saving.peak_bytes < plain.peak_bytes
    assert 1.2 * plain.flops < saving.flops < 1.4 * plain.flops


def test_peak_memory_counts_what_lives_at_a_time_and_no_view_twice():
    before = torch.ones(1000)
    with footprint.PeakMemory() as memory:
        one = before * 2
        two = one.view(10, 100).t() + 1
        assert memory.live == 8000
        del two
        before.add_(1)
    assert memory.live == 4000 and memory.peak == 8000
    del one
    assert memory.live == 0
