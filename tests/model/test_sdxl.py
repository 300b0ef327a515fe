"""An SDXL base goes through training, validation, preview and generation, and samples as diffusers' pipeline does."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.flow.generate.actor import ChunkSampler
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.plan import PROMPTS_NAME, make_plan
from d2f_core.flow.generate.prompts import checked_rows, copy_prompts, scan_prompts
from d2f_core.flow.latents import latent_schema
from d2f_core.model.artifact import describe, load_model, save_artifact, to_uint8
from d2f_core.model.autoencoder import autoencoder_fingerprint, load_autoencoder
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.model.denoiser import ConditionError
from d2f_core.model.export import export_diffusers
from d2f_core.model.image_sizes import SIZE_COLUMNS, sizes_of_new_images, sizes_of_rows
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.model.text_to_image import TextToImage
from d2f_core.randomness import keyed_normal
from d2f_core.train.config import TrainConfig
from pipelines.configs import FinetuneConfig
from pipelines.finetune import check
from pipelines.finetune_task import COLUMNS, build_task
from tests.model.tiny_sdxl import write_tiny_sdxl

PROMPTS = ["a cat", "dog"]
OBJECTIVES = ("diff2flow", "flow_matching", "diffusion")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def rows(count: int = 4) -> dict[str, np.ndarray]:
    """Columns of a latent table, with `epoch` and `row`: photos of 1200x800 of which the centre square was kept."""
    generator = np.random.default_rng(0)
    return {
        "caption": np.array(["a cat", "dog", "a cat", "bird"][:count], dtype=object),
        "latent_mean": generator.normal(size=(count, 4, 8, 8)).astype(np.float16),
        "latent_std": np.full((count, 4, 8, 8), 0.1, np.float16),
        "bucket": np.array(["64x64"] * count, dtype=object),
        "width": np.full(count, 1200, np.int32),
        "height": np.full(count, 800, np.int32),
        "crop": np.array([[200, 0, 1000, 800]] * count, np.int32),
        "epoch": np.zeros(count, np.int64),
        "row": np.arange(count),
    }


def task(base: Path, **config) -> TextToImage:
    lora = LoraConfig(rank=2, targets="attention")
    model = ModelConfig(base=str(base), **{"lora": lora, **config})
    return TextToImage(resolve_base(str(base)), model, seed=0, dtype=torch.float32, device="cpu")


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_loss_trains_an_sdxl_base(base, objective, method):
    sdxl = task(base, objective=objective, method=method)
    losses = sdxl.loss(sdxl.module, sdxl.to_batch(rows()))
    assert losses.shape == (4,) and losses.isfinite().all()
    losses.mean().backward()
    gradients = [p.grad for p in sdxl.module.parameters() if p.requires_grad]
    assert gradients and any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_the_loss_depends_on_caption_and_sizes(base):
    sdxl = task(base, caption_dropout=0.0)
    batch = sdxl.to_batch(rows())
    losses = sdxl.loss(sdxl.module, batch)
    for name in ("text_states", "pooled_text", "time_ids"):
        other = {**batch, name: batch[name] + 100}
        assert (sdxl.loss(sdxl.module, other) - losses).abs().min() > 0, name


def test_a_batch_holds_both_encoders_words_and_the_sizes_of_each_image(base):
    sdxl = task(base, caption_dropout=0.0)
    batch = sdxl.to_batch(rows())
    expected = load_text_encoder(sdxl.base).condition(list(rows()["caption"]))
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=1e-6)
    assert batch["time_ids"].tolist() == [[800, 1200, 0, 16, 64, 64]] * 4


def test_a_mirrored_image_is_drawn_for_half_the_samples_by_sample_and_epoch_with_its_crop_mirrored(base):
    sdxl, columns = task(base, caption_dropout=0.0), {name: np.repeat(each, 16, 0) for name, each in rows().items()}
    columns |= {"row": np.arange(64), "crop": np.array([[100, 0, 900, 800]] * 64, np.int32)}
    zero, one = np.zeros_like(columns["latent_std"]), np.ones_like(columns["latent_std"])
    columns |= {"latent_mean": zero, "latent_std": zero, "flipped_mean": one, "flipped_std": zero}
    batch = sdxl.to_batch(columns)
    flipped = batch["data"].mean((1, 2, 3)).bool()
    assert batch["data"].unique().tolist() == [0, 1] and 20 < flipped.sum() < 44
    corners = batch["time_ids"][:, 3].tolist()
    assert corners == [24 if each else 8 for each in flipped], "of 1200 pixels, 300 are left out on the right"
    order = np.random.default_rng(0).permutation(64)
    again = sdxl.to_batch({name: each[order] for name, each in columns.items()})
    assert torch.equal(again["data"], batch["data"][order]), "the coin is the sample's"
    later = sdxl.to_batch(columns | {"epoch": np.ones(64, np.int64)})["data"].mean((1, 2, 3)).bool()
    assert 16 < (later != flipped).sum() < 48, "and is tossed again in every epoch"


def test_a_dropped_caption_is_what_guidance_starts_from(base):
    sdxl = task(base, caption_dropout=0.999)
    batch, null = sdxl.to_batch(rows()), sdxl.condition([""] * 4)
    for name, value in null.items():
        assert torch.equal(batch[name], value) and not value.any()


def test_the_crop_is_told_in_pixels_of_the_resized_image_as_in_the_training_of_sdxl():
    """As diffusers' train_text_to_image_sdxl.py: resize the short side to the resolution, then cut the centre."""
    sizes, resolution, crops, expected = [(1200, 801), (640, 1000), (300, 200)], 512, [], []
    for width, height in sizes:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        crops.append([left, top, left + side, top + side])
        resized = width * resolution / side, height * resolution / side
        x1, y1 = (max(0, round((length - resolution) / 2)) for length in resized)
        expected.append([height, width, y1, x1, resolution, resolution])
    widths, heights = zip(*sizes, strict=True)
    columns = {"width": widths, "height": heights, "crop": crops, "bucket": ["512x512"] * 3}
    assert (sizes_of_rows(columns) - torch.tensor(expected)).abs().max() <= 1
    columns = {"width": [100], "height": [90], "crop": [[10, 20, 60, 40]], "bucket": ["64x128"]}
    assert sizes_of_rows(columns).tolist() == [[90, 100, 64, 26, 64, 128]]


@pytest.mark.parametrize("missing", SIZE_COLUMNS)
def test_a_table_read_without_its_sizes_is_refused(base, missing):
    arrays = {name: values for name, values in rows().items() if name != missing}
    with pytest.raises(ConditionError, match=rf"no column {missing}, but SDXL .*Read the columns bucket, width"):
        task(base).to_batch(arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket": np.array(["64"] * 4)}, r"bucket='64' must be HEIGHTxWIDTH"),
        ({"crop": np.zeros((4, 4), np.int32)}, r"crop=.* must be left, top, right, bottom of at least one pixel"),
    ],
)
def test_sizes_without_meaning_are_refused(base, change, message):
    with pytest.raises(ConditionError, match=message):
        task(base).to_batch({**rows(), **change})


def test_the_validation_loss_uses_the_sizes_of_the_rows(base):
    sdxl = task(base)
    total, count = sdxl.validation_loss(sdxl.module, rows())
    assert count == 40 and np.isfinite(total)
    assert total == sdxl.validation_loss(sdxl.module, rows())[0]
    assert total != sdxl.validation_loss(sdxl.module, {**rows(), "width": np.full(4, 5000)})[0]


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_preview_draws_every_prompt(base, objective):
    sdxl = task(base, objective=objective)
    images = sdxl.preview(sdxl.module, PreviewConfig(steps=2), PROMPTS)
    assert [image.size for image in images] == [(64, 64)] * 2
    assert np.asarray(images[0]).std() > 0


@torch.no_grad()
def test_ddim_with_guidance_equals_the_pipeline_of_diffusers(base):
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=noise(), num_inference_steps=5, guidance_scale=3.0, eta=0.0, output_type="latent"
    ).images
    model, encoder = load_model(str(base)), load_text_encoder(resolve_base(str(base)))
    condition, null = encoder.condition(PROMPTS), encoder.condition(["", ""])
    ours, evaluations = sample_latents(model, noise(), condition, null, solver="ddim", steps=5, guidance=3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert evaluations == 5 and (theirs - noise()).abs().max() > 0.1
    sized = {"time_ids": sizes_of_new_images(2, 64, 640)}
    others, _ = sample_latents(model, noise(), condition | sized, null | sized, solver="ddim", steps=5, guidance=3.0)
    assert (others - theirs).abs().max() > 1e-3


@torch.no_grad()
def test_text_states_alone_are_refused(base):
    states = load_text_encoder(resolve_base(str(base))).encode(PROMPTS)
    with pytest.raises(ConditionError, match=r"pooled_text is missing: .*\(SDXL\)"):
        sample_latents(load_model(str(base)), noise(), states, states, solver="euler", steps=1, guidance=1.0)


@torch.no_grad()
def test_an_exported_sdxl_model_samples_in_diffusers_as_here(base, tmp_path):
    sdxl = task(base, method="full")
    sampling = SamplingDefaults(steps=3, guidance=2.0)
    description = describe(sdxl.base, objective="diff2flow", method="full", sampling=sampling, training={})
    save_artifact(tmp_path / "artifact", sdxl.module, description)
    assert not export_diffusers(str(tmp_path / "artifact"), str(tmp_path / "exported")).missing
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusionXLPipeline
    theirs = pipeline(PROMPTS, latents=noise(), num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    condition, null = sdxl.condition(PROMPTS), sdxl.condition(["", ""])
    model = load_model(str(tmp_path / "exported"), base_uri=str(base))
    ours, _ = sample_latents(model, noise(), condition, null, solver="euler", steps=3, guidance=2.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_autoencoder_keeps_its_own_scaling_and_full_precision(base):
    autoencoder = load_autoencoder(resolve_base(str(base)))
    assert autoencoder.scaling_factor == 0.13025 and autoencoder.network.dtype == torch.float32
    pixels = 2 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    expected = autoencoder.network.encode(pixels).latent_dist.mean * 0.13025
    torch.testing.assert_close(autoencoder.encode(pixels)[0], expected, rtol=0, atol=1e-6)


def test_the_finetune_job_reads_what_sdxl_needs_from_the_table(base, stack, tmp_path):
    """The job's task by itself, from a table on disk: a batch, its loss, and an evaluation with images."""
    more = {"sample_id": [f"{row:032x}" for row in range(4)], "source_uri": ["test"] * 4}
    table = arrays_to_table(rows() | more, latent_schema((4, 8, 8)))
    latents = str(tmp_path / "latents")
    fingerprint = {"autoencoder": autoencoder_fingerprint(resolve_base(str(base)))}
    part = write_part(latents, "part-0.parquet", table)
    write_manifest(latents, Manifest(kind="latents", files=(part,), fingerprint=fingerprint))
    config = FinetuneConfig(
        model=ModelConfig(base=str(base), lora=LoraConfig(rank=2)),
        latents=latents,
        output=str(tmp_path / "out"),
        holdout_rows=2,
        preview=PreviewConfig(prompts=tuple(PROMPTS), steps=1),
        train=TrainConfig(num_steps=1, global_batch_size=2, micro_batch_size=2),
    )
    plan = check(config).plan
    job = build_task(config, resolve_base(config.model.base).content_hash, plan, "cpu")
    read = pq.read_table(f"{latents}/part-0.parquet", columns=list(COLUMNS))
    numbers = pa.array(range(4), pa.int64())
    batch = job.to_batch(read.append_column("epoch", numbers).append_column("row", numbers))
    assert batch["time_ids"].tolist() == [[800, 1200, 0, 16, 64, 64]] * 4
    assert job.loss_fn(job.module, batch).isfinite().all()
    found = job.evaluate()
    assert np.isfinite(found.metrics["validation_flow_loss"])
    assert [image.size for image in found.images] == [(64, 64)] * 2
    with pytest.raises(BaseModelError, match=r"has the hash [0-9a-f]{64} on this node, and other where the training"):
        build_task(config, "other", plan, "cpu")


@torch.no_grad()
def test_a_generation_job_draws_what_the_model_samples(base, tmp_path):
    """The job's actor by itself: chunk numbers in, images and index parts out."""
    prompts_file = tmp_path / "prompts.csv"
    prompts_file.write_text("prompt,negative_prompt,seed\na cat,,7\ndog,cat,8\n")
    config = GenerateConfig(prompts=str(prompts_file), model=str(base), output=str(tmp_path / "out"), steps=(2,))
    prompts, model = scan_prompts(config.prompts), load_model(config.model)
    plan = make_plan(config, prompts, model, config.model)
    (tmp_path / "out").mkdir()
    copy_prompts(prompts, tmp_path / "out" / PROMPTS_NAME, plan.chunk_size)
    sampler = ChunkSampler(plan, config.output, torch.get_num_threads())
    assert sampler(0)["failed"] == [0]
    index = pq.read_table(tmp_path / "out/index/part-000000.parquet").to_pylist()
    assert [row["prompt"] for row in index] == PROMPTS and all(row["error"] is None for row in index)
    encoder = load_text_encoder(model.base)
    names = list(checked_rows(config.prompts))
    made = sampler.sampler.sample(plan.requests(names))
    drawn = torch.from_numpy(np.stack([one.latent for one in made]))
    shape = model.base.latent_shape(plan.height, plan.width)
    start = np.concatenate([keyed_normal(row["seed"], [row["sample_id"]], shape) for row in names])
    options = {"solver": plan.solver, "steps": 2, "guidance": plan.guidance}
    given, null = encoder.condition(PROMPTS), encoder.condition(["", "cat"])
    ours, _ = sample_latents(model, torch.from_numpy(start), given, null, **options)
    torch.testing.assert_close(drawn, ours, rtol=0, atol=1e-4)
    pixels = to_uint8(load_autoencoder(model.base).decode(drawn)).numpy()
    for row, image in zip(index, pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(row["image_uri"])), image)
