"""The task makes the same batch of a row wherever a run is resumed."""

from pathlib import Path

import pytest
import torch

from d2f_core.model.base import resolve_base
from d2f_core.model.lora import LoraConfig
from d2f_core.model.text_to_image import ENCODED_TOGETHER, ModelConfig, TextToImage
from tests.inference.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def make(base: Path) -> TextToImage:
    config = ModelConfig(base=str(base), lora=LoraConfig(rank=2))
    return TextToImage(resolve_base(str(base)), config, seed=0, dtype=torch.float32, device="cpu")


class Recording:
    """The task's encoder, and the sizes of the batches that it was given."""

    def __init__(self, encoder) -> None:
        self.encoder, self.sizes = encoder, []

    def condition(self, captions):
        self.sizes.append(len(captions))
        return self.encoder.condition(captions)


def test_captions_are_encoded_in_batches_of_one_size_whatever_is_known_already(base: Path, monkeypatch):
    """Another size may round otherwise, and what is known depends on where a run was resumed."""
    captions = [f"{'a very long caption about ' * (i % 3)}thing {i}" for i in range(40)]
    task = make(base)
    recording = Recording(task._text_encoder)
    monkeypatch.setattr(task, "_text_encoder", recording)
    together = task.condition(captions)["text_states"]
    task._conditions.clear()
    for index in (0, 1, 17, 39, 5):
        assert torch.equal(task.condition([captions[index]])["text_states"][0], together[index]), captions[index]
    assert set(recording.sizes) == {ENCODED_TOGETHER}
