"""Latents are scaled as diffusers' own pipelines scale them, by every field of an autoencoder's config."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import StableDiffusion3Img2ImgPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.encode.check import check_encode
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.hashing import hash_directory
from d2f_core.model.artifact import ArtifactError
from d2f_core.model.autoencoder import autoencoder_fingerprint, check_autoencoder, latent_scale, load_autoencoder
from d2f_core.model.base import BaseModel, BaseModelError, resolve_base
from d2f_core.model.export import export_diffusers
from tests.model.artifacts import trained
from tests.model.complete_base import write_complete_base
from tests.model.tiny_sd import write_tiny

MEAN, STD = [0.5, -1.25, 0.0, 2.0], [0.25, 1.5, 1.0, 3.0]
MOMENTS = {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base"), "sd15")


def with_config(whole: Path, target: Path, *without: str, **fields: Any) -> BaseModel:
    directory = shutil.copytree(whole, target)
    file = directory / "vae/config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in without}))
    return resolve_base(str(directory))


@pytest.mark.parametrize(
    ("fields", "pipeline"),
    [
        ({"scaling_factor": 0.13025}, StableDiffusionXLImg2ImgPipeline),
        (MOMENTS, StableDiffusionXLImg2ImgPipeline),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, StableDiffusion3Img2ImgPipeline),
    ],
)
def test_latents_and_their_deviations_are_those_of_diffusers_pipelines(
    whole: Path, tmp_path: Path, fields: dict[str, Any], pipeline: Any
) -> None:
    autoencoder = load_autoencoder(with_config(whole, tmp_path / "base", **fields))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    unnoised = SimpleNamespace(scale_noise=lambda latents, *_: latents)
    whatever: Any = SimpleNamespace(vae=autoencoder.network, scheduler=unnoised)
    more = {"add_noise": False} if pipeline is StableDiffusionXLImg2ImgPipeline else {}
    theirs = pipeline.prepare_latents(
        whatever, pixels, torch.zeros(1), 2, 1, torch.float32, "cpu", torch.Generator().manual_seed(3), **more
    )
    mean, std = autoencoder.encode(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean + std * noise, theirs, rtol=0, atol=1e-5)
    config: Any = autoencoder.network.config
    scaled = theirs.clone()
    if config.latents_mean:  # the lines of the pipelines' __call__, which have no function of their own
        mean, std = (torch.tensor(each).view(1, 4, 1, 1) for each in (config.latents_mean, config.latents_std))
        own = scaled * std / config.scaling_factor + mean
    else:
        own = scaled / config.scaling_factor + (config.shift_factor or 0)
    decoded = VaeImageProcessor.denormalize(cast(Any, autoencoder.network.decode(own)).sample)  # to [0, 1]
    torch.testing.assert_close(autoencoder.decode(theirs) / 2 + 0.5, decoded, rtol=0, atol=1e-5)


def test_a_plain_scaling_keeps_bits_and_fingerprint_and_any_other_field_changes_it(whole: Path, tmp_path: Path) -> None:
    plain = resolve_base(str(whole))
    written = f"{hash_directory(whole / 'vae')} 0.18215"
    assert autoencoder_fingerprint(plain) == sha256(written.encode()).hexdigest(), "that of tables made so far"
    latents = torch.randn(1, 4, 8, 8)
    scale = latent_scale(plain)
    assert torch.equal(scale.scaled(latents), latents * 0.18215)
    assert torch.equal(scale.unscaled(latents), latents / 0.18215)
    shifted = with_config(whole, tmp_path / "shifted", shift_factor=0.25)
    before = f"{hash_directory(shifted.path / 'vae')} 0.18215"
    assert autoencoder_fingerprint(shifted) != sha256(before.encode()).hexdigest(), "tables that ignored the shift"


def test_an_autoencoder_without_a_scaling_has_that_of_diffusers(whole: Path, tmp_path: Path) -> None:
    base = with_config(whole, tmp_path / "base", "scaling_factor")
    assert load_autoencoder(base).scaling_factor == latent_scale(base).factor == 0.18215
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    (images / "a.txt").write_text("a cat")
    config = EncodeConfig(
        source=ImageSource(uri=str(images)), base=base.uri, output=str(tmp_path / "out"), resolution=64
    )
    assert check_encode(config).spec.fingerprint["scaling_factor"] == 0.18215


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling_factor": None}, r"vae/config.json has scaling_factor=None, which must be above 0\. Give that of"),
        ({"scaling_factor": -1.0}, r"scaling_factor=-1.0, which must be above 0"),
        ({"shift_factor": "no"}, r"shift_factor='no', which must be a number"),
        (
            {"latents_mean": MEAN},
            r"latents_std=None and shift_factor=None: mean and deviation must come together",
        ),
        ({"latents_mean": MEAN[:3], "latents_std": STD[:3]}, r"must come together with 4 finite numbers each"),
        ({"latents_mean": MEAN, "latents_std": [1, 1, 0, 1]}, r"deviations above 0"),
        ({**MOMENTS, "shift_factor": 0.5}, r"and without a shift_factor\. Copy the config"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused_before_weights_are_read(
    whole: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    base = with_config(whole, tmp_path / "base", **fields)
    for look in (check_autoencoder, load_autoencoder, autoencoder_fingerprint):
        with pytest.raises(BaseModelError, match=message):
            look(base)


@pytest.mark.parametrize("fields", [{"shift_factor": 0.25}, MOMENTS])
def test_an_export_whose_pipeline_would_ignore_the_shift_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = with_config(write_complete_base(tmp_path / "plain"), tmp_path / "base", **fields)
    artifact = trained(base.path, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"StableDiffusionPipeline decodes latents without .*Sample it with this"):
        export_diffusers(artifact, str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()
