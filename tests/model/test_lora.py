"""LoRA changes nothing at first, trains only its adapters, and survives a round trip."""

import pytest
import torch

from d2f_core.model.base import resolve_base
from d2f_core.model.denoiser import as_denoiser, load_unet
from d2f_core.model.lora import LoraConfig, add_lora, load_lora
from tests.inference.tiny_base import write_tiny_base

X, TIMESTEP, STATES = torch.randn(2, 4, 8, 8), torch.tensor([10.5, 700.0]), torch.randn(2, 8, 384)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return resolve_base(str(write_tiny_base(tmp_path_factory.mktemp("base"))))


@torch.no_grad()
def output(network):
    return as_denoiser(network)(X, TIMESTEP, text_states=STATES)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_an_adapter_at_init_changes_exactly_nothing(base, targets):
    before = output(load_unet(base))
    assert (output(add_lora(load_unet(base), LoraConfig(rank=4, targets=targets))) - before).abs().max() == 0


def test_only_adapters_are_trained_and_convolutions_have_them(base):
    network = add_lora(load_unet(base), LoraConfig(rank=4))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    for part in (
        "conv_in",
        "conv_out",
        "resnets.0.conv1",
        "time_emb_proj",
        "attn1.to_q",
        "attn2.to_out.0",
        "ff.net.0.proj",
    ):
        assert any(f".{part}.lora_A" in name for name in trained), part


def test_a_saved_adapter_gives_the_same_output_when_loaded_and_merged(base, tmp_path):
    network = add_lora(load_unet(base), LoraConfig(rank=4, alpha=6.0))
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = output(network)
    assert (expected - output(load_unet(base))).abs().max() > 1e-3
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(output(load_lora(load_unet(base), tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="lora rank=0"):
        LoraConfig(rank=0)
