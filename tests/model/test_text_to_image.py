"""The task makes the same batch of a row wherever a run is resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2f_core.model.base import resolve_base
from d2f_core.model.caption_cache import ENCODED_TOGETHER, CaptionCache
from d2f_core.model.config import LoraConfig, ModelConfig
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.model.text_to_image import TextToImage
from d2f_core.objective.time_sampling import TimeSampling
from tests.devices import OnlyOn
from tests.flow.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def make(base: Path, **given) -> TextToImage:
    config = ModelConfig(base=str(base), lora=LoraConfig(rank=2), **given)
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
    recording = Recording(load_text_encoder(task.base))
    monkeypatch.setattr(task, "_captions", CaptionCache(recording))
    together = task.condition(captions)["text_states"]
    task._captions.clear()
    for index in (0, 1, 17, 39, 5):
        assert torch.equal(task.condition([captions[index]])["text_states"][0], together[index]), captions[index]
    assert set(recording.sizes) == {ENCODED_TOGETHER}


def test_flow_times_are_shifted_by_the_size_of_the_images(base: Path):
    """Twice the edge: a shift of 2; the base's own size: none. Beside it, a shift of its own multiplies."""
    channels, height, width = resolve_base(str(base)).latent_shape(*resolve_base(str(base)).default_size)
    generator = torch.Generator().manual_seed(0)

    def loss(scale: int, **given) -> torch.Tensor:
        shape = (3, channels, scale * height, scale * width)
        data, noise = (torch.randn(shape, generator=generator.manual_seed(seed)) for seed in (1, 2))
        task = make(base, **given)
        batch = {"data": data, "noise": noise, "uniform": torch.tensor([0.2, 0.5, 0.8]), **task.condition(["x"] * 3)}
        return task.loss(task.module, batch)

    assert torch.equal(loss(1, shift_by_resolution=True), loss(1))
    assert not torch.equal(loss(2, shift_by_resolution=True), loss(2))
    assert torch.equal(loss(2, shift_by_resolution=True), loss(2, times=TimeSampling(shift=2.0)))
    both = loss(2, shift_by_resolution=True, times=TimeSampling(shift=1.5))
    assert torch.equal(both, loss(2, times=TimeSampling(shift=3.0)))


def test_bars_beside_a_padded_image_are_left_out_of_the_losses(base: Path):
    task, draw, shape = make(base, caption_dropout=0), np.random.default_rng(0), (3, 4, 8, 8)
    mask = np.zeros((3, 1, 8, 8), np.uint8)
    mask[..., 2:5] = 1
    rows = {
        "caption": np.array(["a", "b", "c"], object), "row": np.arange(3), "epoch": np.zeros(3, np.int64),
        "latent_mean": draw.normal(size=shape).astype(np.float16), "latent_std": np.zeros(shape, np.float16),
    }  # fmt: skip
    batch = task.to_batch({**rows, "mask": mask})
    assert batch["mask"].shape == mask.shape and "mask" not in task.to_batch(rows)
    batch["mask"].requires_grad_()
    losses = task.loss(task.module, batch)
    (slope,) = torch.autograd.grad(losses.sum(), batch["mask"])
    error = slope * batch["mask"].sum((2, 3), keepdim=True) + losses[:, None, None, None]  # of each latent, by the rule
    inside = (error * batch["mask"]).sum((1, 2, 3)) / batch["mask"].sum((1, 2, 3))
    torch.testing.assert_close(losses, inside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(losses, task.loss(task.module, task.to_batch(rows)))
    masked, whole = (task.validation_loss(task.module, rows | more)[0] for more in ({"mask": mask}, {}))
    assert masked != whole
    everything = {"mask": np.ones_like(mask)}
    assert task.validation_loss(task.module, rows | everything)[0] == pytest.approx(whole)


def test_a_shift_is_refused_where_no_flow_times_are_drawn(base: Path):
    with pytest.raises(ValueError, match=r"shift_by_resolution belong to the flow losses.*Remove them"):
        make(base, objective="diffusion", shift_by_resolution=True)


def test_a_step_and_an_evaluation_stay_on_their_device(base: Path):
    """Shown on a device without numbers, where a tensor that stayed behind is found on any machine."""
    task = TextToImage(resolve_base(str(base)), ModelConfig(base=str(base)), seed=0, dtype=torch.float32, device="meta")
    task.module.to("meta")
    shape = task.base.latent_shape(*task.base.default_size)
    columns = {
        "latent_mean": np.ones((3, *shape), np.float16), "latent_std": np.ones((3, *shape), np.float16),
        "caption": np.array(["a", "b", ""], object), "epoch": np.zeros(3, int), "row": np.arange(3),
    }  # fmt: skip
    with OnlyOn("meta") as seen:
        assert task.loss(task.module, task.to_batch(columns)).device.type == "meta"
        assert task.validation_loss(task.module, columns)[1] == 30
    assert seen.operations > 100
