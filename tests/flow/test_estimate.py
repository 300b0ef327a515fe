"""An estimate of a finetuning counts what its rows hold, and refuses sizes that no latent has."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch

from d2f_core.flow.estimate.config import EstimateConfig
from d2f_core.flow.estimate.job import build_on_meta, estimate, report, worker_bytes
from d2f_core.model import footprint
from d2f_core.model.architectures import read_architecture
from d2f_core.model.config import LoraConfig, ModelConfig
from d2f_core.train.config import TrainConfig
from d2f_core.train.memory import PROCESS_BYTES, Memory
from tests.model.tiny_sd import write_tiny

SIDE = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EstimateConfig:
    base = write_tiny(tmp_path_factory.mktemp("base"), "sd15")
    pixels = SIDE * read_architecture(str(base)).pixels_per_latent
    train = TrainConfig(micro_batch_size=1, global_batch_size=1, num_workers=1, use_gpu=False)
    model = ModelConfig(base="", lora=LoraConfig(rank=2))
    return EstimateConfig(architecture=str(base), resolution=pixels, model=model, train=train, rows=1000)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are counted in seconds, by tests of their own."""
    count = footprint.PassCount(flops=3 * 10**9, forward_flops=10**9, peak_bytes=10**6, held_bytes=10**6)
    monkeypatch.setattr(footprint, "count_pass", lambda *_, **__: count)
    monkeypatch.setattr(footprint, "encode_flops", lambda *_: 10**9)
    monkeypatch.setattr(footprint, "text_flops", lambda *_: 0)


@pytest.mark.parametrize("resolution", [500, 0, -8])
def test_a_size_that_the_autoencoder_does_not_divide_is_refused(resolution: int):
    with pytest.raises(ValueError, match=rf"resolution={resolution} must be a multiple of the autoencoder's 8 pixels"):
        estimate(EstimateConfig(architecture="sd15", resolution=resolution))


@pytest.mark.usefixtures("counted")
def test_rows_of_reflow_also_hold_the_noise_and_those_of_depth_the_images_latent_and_a_mask(config: EstimateConfig):
    depth = ModelConfig(base="", task="image_to_depth", lora=LoraConfig(rank=2))
    plain = estimate(config).row_bytes
    latent = 4 * SIDE * SIDE
    assert estimate(dataclasses.replace(config, pairs=True)).row_bytes - plain == 2 * latent
    assert estimate(dataclasses.replace(config, model=depth)).row_bytes - plain == 2 * latent + SIDE * SIDE
    unet = read_architecture(config.architecture).build_unet()
    assert build_on_meta(read_architecture(config.architecture), depth).config["in_channels"] == 8
    assert unet.config["in_channels"] == 4


@pytest.mark.usefixtures("counted")
def test_a_gpu_that_is_not_known_is_reckoned_by_its_own_peak(config: EstimateConfig):
    preset, own = config, dataclasses.replace(config, tflops=2 * 312)
    found = estimate(preset), estimate(own)
    assert found[1].train_hours == pytest.approx(found[0].train_hours / 2)
    assert "35% of 624 TFLOP/s per GPU (assumed)" in report(own, found[1])
    assert "35% of 312 TFLOP/s per GPU (assumed)" in report(preset, found[0])


@pytest.mark.usefixtures("counted")
def test_times_on_an_h100_are_a_range_until_one_was_measured_and_have_a_price(config: EstimateConfig):
    """3 GFLOP a sample: an A100 at 35 % makes 36,400 a second, an H100 at 20 to 23 % 65,933 to 75,823."""
    train = dataclasses.replace(config.train, num_steps=1000, global_batch_size=80, num_workers=8)
    small = dataclasses.replace(config, train=train)
    (h100, a100, given, other) = (
        dataclasses.replace(small, gpu="h100"),
        small,
        dataclasses.replace(small, gpu="h100", utilization=0.5, dollars_per_gpu_hour=1e6),
        dataclasses.replace(small, gpu="l40s"),
    )
    text = report(h100, found := estimate(h100))
    assert "Reckoned with 20% to 23% of 989 TFLOP/s per GPU (assumed)" in text
    assert "65933.3 to 75823.3 samples/s per GPU" in text
    assert "dollars at 2.69 to 3.99 each (RunPod on 2026-11-09, Lambda on 2026-09-20, on demand)." in text
    assert found.train_hours == pytest.approx(80_000 / 65_933.3 / 3600 / 8, rel=1e-4)
    assert "36400.0 samples/s per GPU; 0 GPU hours, 0 dollars at 1.39 to 2.79 each" in report(a100, estimate(a100))
    assert "164833.3 samples/s per GPU; 0 GPU hours, 135 dollars at 1000000.00 each.\n" in report(
        given, estimate(given)
    )
    assert "GPU hours. For their price give --dollars-per-gpu-hour.\n" in report(other, estimate(other))


@pytest.mark.usefixtures("counted")
def test_an_evaluation_between_steps_is_counted_at_stage_3_with_a_second_network(config: EstimateConfig):
    """All weights of this network are too small for stage 3 to partition, so a worker holds each of them whole."""
    on_gpus = dataclasses.replace(config.train, use_gpu=True)
    beside = dataclasses.replace(on_gpus, evaluate_on="cpu")
    between, other = (estimate(dataclasses.replace(config, train=train)) for train in (on_gpus, beside))
    with torch.device("meta"):
        vae = read_architecture(config.architecture).build_vae()
    drawn = 4 * sum(parameter.numel() for parameter in vae.parameters()) + max(10**6, footprint.decode_bytes(vae, SIDE))
    for stage in range(4):
        memory, without = between.memory[stage], other.memory[stage]
        assert isinstance(memory, Memory) and isinstance(without, Memory)
        assert memory.evaluation == drawn + (4 * between.total if stage == 3 else 0)
        assert memory.peak - memory.state == max(memory.bucket + memory.evaluation + memory.gradients, memory.saving)
        assert without.evaluation == 0 and without.peak < memory.peak and without.host < memory.host


@pytest.mark.parametrize(("method", "use_gpu"), [("full", False), ("full", True), ("lora", True)])
def test_a_worker_takes_its_process_its_weights_and_without_a_gpu_all_that_it_computes_with(
    config: EstimateConfig, method: Literal["full", "lora"], use_gpu: bool
):
    base = Path(config.architecture)
    total = sum(footprint.sizes(read_architecture(config.architecture).build_unet(), trained=True))
    text = sum(file.stat().st_size for file in base.glob("text_encoder/*.safetensors"))
    model, train = dataclasses.replace(config.model, method=method), TrainConfig(use_gpu=use_gpu, zero_stage=0)
    found = worker_bytes(base, model, train) - PROCESS_BYTES - text
    if method == "lora":  # its own weights are few
        assert 4 * total < found < 4.5 * total
    else:  # weights, two moments, averages: as a checkpoint's copy, and to compute with; gradients and their copies
        assert found == 16 * total + (0 if use_gpu else 16 * total + 8 * total)
