"""DDIM that ends without noise, whatever the base's scheduler config says."""

import json
from pathlib import Path

import pytest
import torch

from d2f_core.model.artifact import load_model
from d2f_core.model.base import resolve_base
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from tests.flow.tiny_base import write_tiny_base


@pytest.fixture(scope="module", params=[False, True])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = write_tiny_base(tmp_path_factory.mktemp("base"))
    place = target / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "set_alpha_to_one": request.param}))
    return target


@torch.inference_mode()
def test_the_last_step_leaves_the_predicted_data_and_no_noise(base: Path) -> None:
    model = load_model(str(base))
    ends_clean = json.loads((base / "scheduler" / "scheduler_config.json").read_text())["set_alpha_to_one"]
    noise = torch.randn((2, *model.base.latent_shape(16, 16)), generator=torch.Generator().manual_seed(0))
    state = load_text_encoder(resolve_base(str(base))).condition(["cat", "dog"])

    def drawn(solver: str) -> torch.Tensor:
        return sample_latents(model, noise, state, state, solver=solver, steps=1, guidance=1.0)[0]

    level = model.base.schedule.num_timesteps - 1
    prediction = model.denoiser(noise, torch.full((2,), float(level)), **state)
    kept = model.base.schedule.alphas_cumprod[level].float()
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    torch.testing.assert_close(drawn("ddim-clean"), (noise - sigma * prediction) / alpha, rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn("ddim"), drawn("ddim-clean")) is ends_clean
