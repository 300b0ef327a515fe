"""The student begins as the network it adapts, and becomes one again."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import (
    StudentError,
    adapted_layers,
    add_adapters,
    load_network,
    merge,
    save_merged,
    tokens,
    trained,
)
from tests.correspondence.tiny_transformers import KINDS, write
from tests.flow.tiny_vision import write_processor


def pixels(size: int = 28, images: int = 2) -> torch.Tensor:
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(images)]
    return Preparation(size=size).pixels(pictures)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_untrained_adapters_change_no_bit(kind: str, tmp_path: Path) -> None:
    config = StudentConfig(base=str(write(tmp_path, kind)))
    network = load_network(config)
    before = tokens(network, pixels(), 14)[0]
    student = add_adapters(network, config, seed=0).eval()
    after, grid = tokens(student, pixels(), 14)
    assert torch.equal(before, after) and grid == (2, 2) and after.shape == (2, 4, 24)
    whole = AutoModel.from_pretrained(tmp_path).eval()(pixel_values=pixels()).last_hidden_state
    assert torch.equal(after, whole[:, KINDS[kind][3] :])


def test_the_papers_shape_trains_294912_weights() -> None:
    """DINOv2-B/14 with registers, rank 8 on queries and values of all blocks."""
    with torch.device("meta"):
        network = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=768, num_attention_heads=12))
    config = StudentConfig(base="b")
    with torch.device("meta"):
        student = add_adapters(network, config, seed=0)
    values = trained(student)
    assert sum(value.numel() for _, value in values) == 294_912 and len(values) == 2 * 2 * 12
    assert all("lora_" in name for name, _ in values), "of the base nothing is trained"


def test_cut_to_fewer_blocks_it_gives_their_normed_tokens(tmp_path: Path) -> None:
    write(tmp_path, "dinov2")
    network = load_network(StudentConfig(base=str(tmp_path), layers=2))
    with torch.inference_mode():
        whole = AutoModel.from_pretrained(tmp_path).eval()
        states = whole(pixel_values=pixels(), output_hidden_states=True).hidden_states[2]
        assert torch.equal(tokens(network, pixels(), 14)[0], whole.layernorm(states)[:, 1:])


def test_adapters_start_at_the_first_block_asked_for(tmp_path: Path) -> None:
    config = StudentConfig(base=str(write(tmp_path, "dinov2")), first_block=1)
    names = adapted_layers(load_network(config), 1)
    assert names == [f"encoder.layer.{block}.attention.{part}_proj" for block in (1, 2) for part in ("q", "v")]
    values = trained(add_adapters(load_network(config), config, seed=0))
    assert sum(value.numel() for _, value in values) == 2 * 2 * (24 * 8 + 8 * 24)


def test_the_seed_draws_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    config = StudentConfig(base=str(write(tmp_path, "dinov2")))
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    found = [dict(trained(add_adapters(load_network(config), config, seed=seed))) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    name = next(name for name in found[0] if "lora_A" in name)
    assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])


def test_merged_it_opens_in_transformers_alone_and_matches_as_before(tmp_path: Path) -> None:
    config = StudentConfig(base=str(write(tmp_path / "base", "dinov2-with-registers")), layers=2)
    student = add_adapters(load_network(config), config, seed=0).eval()
    for _, value in trained(student):
        torch.nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(value.numel()))
    with torch.inference_mode():
        found = tokens(student, pixels(), 14)[0]
        student.save_pretrained(str(tmp_path / "adapter"))
        save_merged(merge(copy.deepcopy(student)), tmp_path / "merged")
        opened = AutoModel.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(tokens(opened, pixels(), 14)[0], found, rtol=0, atol=1e-5)
        again = PeftModel.from_pretrained(load_network(config), tmp_path / "adapter").eval()
        assert torch.equal(tokens(again, pixels(), 14)[0], found)
        assert (found - tokens(load_network(config), pixels(), 14)[0]).abs().max() > 0.01


@pytest.mark.parametrize(("layers", "first"), [(4, 0), (2, 2), (0, 3)])
def test_blocks_that_are_not_there_are_refused(layers: int, first: int, tmp_path: Path) -> None:
    config = StudentConfig(base=str(write(tmp_path, "dinov2")), layers=layers, first_block=first)
    with pytest.raises(StudentError, match=r"has 3 blocks.*do not fit"):
        load_network(config)


def test_a_network_without_attention_is_refused(tmp_path: Path) -> None:
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)).save_pretrained(tmp_path)
    write_processor(tmp_path)
    with pytest.raises(StudentError, match="Give a vision transformer"):
        load_network(StudentConfig(base=str(tmp_path)))


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"layers": -1}, {"first_block": -1}])
def test_a_config_that_means_nothing_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="Mend that one"):
        StudentConfig(base="b", **fields)
