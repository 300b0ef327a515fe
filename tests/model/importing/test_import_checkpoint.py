"""From one file, a directory, another autoencoder and LoRAs to a base model, checked and written once."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_core import storage
from d2f_core.model import base_probe
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.base_probe import Reading
from d2f_core.model.denoiser import load_unet
from d2f_core.model.importing import job
from d2f_core.model.importing.config import ImportCheckpointConfig, ImportCheckpointError, lora_and_strength
from d2f_core.model.importing.job import check_checkpoint_import, import_checkpoint
from d2f_core.objective.schedule import PREDICTION_TYPES
from tests.model.importing.lora_files import attention_layers, changes_for, kohya, networks_of, save
from tests.model.single_file.files import assert_equal, changed, put_configs_beside, tensors_of, write_file
from tests.model.tiny_sd import write_tiny
from tests.model.tiny_sdxl import write_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("importing") / "base", "sd15")


@pytest.fixture(scope="module")
def file(base: Path) -> Path:
    return write_file(base, base.with_name("one.safetensors"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))


def answers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Let every network answer as one that predicts `kind`."""
    reading = Reading(left={each: 0.1 if each == kind else 1.2 for each in PREDICTION_TYPES})
    monkeypatch.setattr(base_probe, "probe_network", lambda *_: reading)


def imported(source: Path | str, output: Path | str, **more: Any) -> Path:
    config = ImportCheckpointConfig(source=str(source), output=str(output), **more)
    check_checkpoint_import(config)
    assert not import_checkpoint(config).was_there
    return Path(output)


def test_a_file_becomes_a_directory_with_its_weights_and_a_record_of_its_source(
    base: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "out").mkdir()
    config = ImportCheckpointConfig(source=str(file), output=str(tmp_path / "out"))
    done = import_checkpoint(config)
    found = resolve_base(done.output)
    assert_equal(tensors_of(found), tensors_of(resolve_base(str(base))))
    assert (done.was_there, done.prediction, done.content_hash) == (False, "epsilon", found.content_hash)
    record = json.loads((tmp_path / "out/import.json").read_text())
    assert record["settings"]["source"] == str(file) and len(record["source_hash"]) == 64
    written = (tmp_path / "out/unet" / WEIGHTS).stat().st_mtime_ns
    assert dataclasses.replace(import_checkpoint(config), was_there=False) == done
    assert (tmp_path / "out/unet" / WEIGHTS).stat().st_mtime_ns == written
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_other_settings_and_places_in_use_are_refused_before_anything_is_read(
    base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    imported(file, tmp_path / "out")
    monkeypatch.setattr(job.sources, "examined", lambda uri: pytest.fail("was read"))
    other = ImportCheckpointConfig(source=str(file), output=str(tmp_path / "out"), prediction="v_prediction")
    for call in (check_checkpoint_import, import_checkpoint):
        with pytest.raises(ImportCheckpointError, match=r"an import with another prediction, of .*Give another output"):
            call(other)
        with pytest.raises(ImportCheckpointError, match="holds files that no import has written"):
            call(ImportCheckpointConfig(source=str(file), output=str(base)))
        with pytest.raises(ImportCheckpointError, match=r"output='x\.safetensors' must be a directory"):
            call(ImportCheckpointConfig(source=str(file), output="x.safetensors"))
        with pytest.raises(ImportCheckpointError, match=r"source is empty\. Give --source"):
            call(ImportCheckpointConfig(output="x"))


def test_a_killed_import_to_s3_is_gone_on_with(base: Path, file: Path, s3: Any, monkeypatch: pytest.MonkeyPatch):
    del s3
    there = "s3://d2f/test-importing/file/one"
    storage.write_bytes(f"{there}.safetensors", file.read_bytes())
    storage.upload_tree(file.with_suffix(".configs"), f"{there}.configs")
    config = ImportCheckpointConfig(source=f"{there}.safetensors", output="s3://d2f/test-importing/out")
    upload_tree = storage.upload_tree

    def killed(source: Path, uri: str) -> None:
        upload_tree(source / "unet", f"{uri}/unet")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "upload_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(config)
    monkeypatch.setattr(storage, "upload_tree", upload_tree)
    check_checkpoint_import(config)
    done = import_checkpoint(config)
    assert not done.was_there and import_checkpoint(config).was_there
    assert_equal(tensors_of(resolve_base(done.output)), tensors_of(resolve_base(str(base))))
    assert resolve_base(done.output).content_hash == done.content_hash


def test_a_variant_in_half_precision_is_read_and_named_plainly(base: Path, tmp_path: Path):
    half = Path(shutil.copytree(base, tmp_path / "half"))
    for part in ("unet", "vae"):
        weights = {name: tensor.half() for name, tensor in load_file(half / part / WEIGHTS).items()}
        (half / part / WEIGHTS).unlink()
        save_file(weights, half / part / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    (half / "README.md").write_text("a note")
    out = imported(half, tmp_path / "out")
    assert {each.name for each in (out / "unet").iterdir()} == {"config.json", WEIGHTS}
    assert not (out / "README.md").exists()
    assert_equal(tensors_of(resolve_base(str(out))), tensors_of(resolve_base(str(half))))


@pytest.mark.parametrize("names", ["original", "with its prefix", "diffusers", "a directory", "a whole model"])
def test_another_autoencoder_is_put_in(base: Path, file: Path, tmp_path: Path, names: str):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = {name: tensor + 0.01 for name, tensor in load_file(base / "vae" / WEIGHTS).items()}
    save_file(weights, other / "vae" / WEIGHTS, {"format": "pt"})
    one = load_file(write_file(other, tmp_path / "other.safetensors"))
    prefix = "first_stage_model."
    alone = {key: tensor for key, tensor in one.items() if key.startswith(prefix)}
    given = {
        "original": lambda: save({k.removeprefix(prefix): t for k, t in alone.items()}, tmp_path / "vae.safetensors"),
        "with its prefix": lambda: save(alone, tmp_path / "vae.safetensors"),
        "diffusers": lambda: other / "vae" / WEIGHTS,
        "a directory": lambda: other / "vae",
        "a whole model": lambda: other,
    }[names]()
    found = resolve_base(str(imported(file, tmp_path / "out", vae=str(given))))
    assert_equal(tensors_of(found), tensors_of(resolve_base(str(other))))


def test_an_autoencoder_of_other_latents_is_told_of_or_refused(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_vae(tmp_path / "scaled", scaling_factor=0.5)
    found = imported(base, tmp_path / "out", vae=str(tmp_path / "scaled"))
    assert "has scaling_factor=0.5, and the checkpoint's own autoencoder 0.18215" in caplog.text
    assert load_autoencoder(resolve_base(str(found))).scale.factor == 0.5
    empty = tmp_path / "empty"
    empty.mkdir()
    save({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    for vae, reason in (
        (empty, "has no config.json of an AutoencoderKL"),
        (tmp_path / "odd.safetensors", r"lacks \d+ tensors of the model's autoencoder, such as"),
    ):
        config = ImportCheckpointConfig(source=str(base), output=str(tmp_path / "no"), vae=str(vae))
        for call in (check_checkpoint_import, import_checkpoint):
            with pytest.raises(ImportCheckpointError, match=reason):
                call(config)
    assert not (tmp_path / "no").exists()


def test_loras_are_merged_in_with_their_strengths(base: Path, file: Path, tmp_path: Path):
    unet = networks_of(base)["unet"]
    layers = attention_layers(unet)
    tensors, added = changes_for(unet, layers, lambda name: f"lora_unet_{name}", kohya)
    lora = save(tensors, tmp_path / "style.safetensors")
    out = imported(file, tmp_path / "out", lora=(f"{lora}:0.5", str(lora)))
    found, before = networks_of(out)["unet"].state_dict(), unet.state_dict()
    for layer in layers:
        assert torch.allclose(found[f"{layer}.weight"], before[f"{layer}.weight"] + 1.5 * added[layer], atol=1e-6)
    missing = ImportCheckpointConfig(source=str(file), output=str(tmp_path / "no"), lora=(f"{tmp_path}/x.safetensors",))
    for call in (check_checkpoint_import, import_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"x\.safetensors' does not exist\. Check the path"):
            call(missing)
    save({"lora_unet_nothing.alpha": torch.tensor(1.0)}, lora)
    config = ImportCheckpointConfig(source=str(file), output=str(tmp_path / "no"), lora=(str(lora),))
    for call in (check_checkpoint_import, import_checkpoint):
        with pytest.raises(ImportCheckpointError, match=r"style\.safetensors' has 1 of 1 keys for which the model"):
            call(config)


@pytest.mark.parametrize("text", ["a.safetensors:0", "a.safetensors:x", "a.safetensors:nan", "a.ckpt:0.5", "a.ckpt"])
def test_a_lora_without_a_usable_strength_or_file_is_refused(text: str):
    with pytest.raises(ImportCheckpointError, match=f"lora='{text}'"):
        ImportCheckpointConfig(lora=(text,))
    assert lora_and_strength("s3://b/a.safetensors") == ("s3://b/a.safetensors", 1.0)
    assert lora_and_strength("s3://b/a.safetensors:-0.8") == ("s3://b/a.safetensors", -0.8)


def test_what_the_network_predicts_is_written_as_it_was_told(base: Path, tmp_path: Path):
    out = imported(base, tmp_path / "v", prediction="v_prediction", zero_snr=True)
    found = resolve_base(str(out))
    assert found.prediction_type == "v_prediction" and found.schedule.trained_range[0] == 0
    assert found.scheduler_config["timestep_spacing"] == "trailing"
    assert resolve_base(str(imported(base, tmp_path / "rf", prediction="flow_prediction"))).is_flow
    config = ImportCheckpointConfig(source=str(base), output=str(tmp_path / "no"), zero_snr=True)
    for call in (check_checkpoint_import, import_checkpoint):
        with pytest.raises(ImportCheckpointError, match="zero_snr with a network that predicts epsilon"):
            call(config)


def test_a_network_that_contradicts_is_refused_and_taken_with_a_warning_as_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    answers(monkeypatch, "v_prediction")
    config = ImportCheckpointConfig(source=str(base), output=str(tmp_path / "out"))
    with pytest.raises(ImportCheckpointError, match=r"is read as epsilon.*Say --prediction v_prediction \(in .* if"):
        import_checkpoint(config)
    assert not (tmp_path / "out").exists()
    imported(base, tmp_path / "out", prediction="epsilon")
    said = "is read as epsilon, but its network puts out what a network of v_prediction does"
    assert said in caplog.text
    caplog.clear()
    load_unet(resolve_base(str(tmp_path / "out")))
    assert said in caplog.text, "what was told holds for whoever reads the base"


def test_a_file_that_says_nothing_is_asked_about_unless_its_network_tells(
    base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    silent = changed(file, tmp_path / "silent.safetensors")
    put_configs_beside(base, silent, scheduler=False)
    config = ImportCheckpointConfig(source=str(silent), output=str(tmp_path / "out"))
    with pytest.raises(
        ImportCheckpointError, match=r"does not say what .*Say it: --prediction epsilon as the family's"
    ):
        import_checkpoint(config)
    assert resolve_base(str(imported(silent, tmp_path / "told", prediction="epsilon"))).prediction_type == "epsilon"
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "other"))
    answers(monkeypatch, "epsilon")
    assert resolve_base(str(imported(silent, tmp_path / "out"))).prediction_type == "epsilon"


def test_a_dry_run_reads_headers_alone(base: Path, file: Path, s3: Any, monkeypatch: pytest.MonkeyPatch):
    del s3
    there = "s3://d2f/test-importing/dry"
    storage.write_bytes(f"{there}/one.safetensors", file.read_bytes())
    storage.upload_tree(file.with_suffix(".configs"), f"{there}/one.configs")
    read: list[int] = []
    read_bytes = storage.read_bytes

    def counted(uri: str, *span: Any, **more: Any) -> bytes:
        data = read_bytes(uri, *span, **more)
        read.append(len(data) if uri.endswith("one.safetensors") else 0)
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    monkeypatch.setattr(storage, "local_file", lambda *_: pytest.fail("was copied"))
    uri = f"{there}/one.safetensors"
    check_checkpoint_import(ImportCheckpointConfig(source=uri, output=f"{there}/out", vae=uri))
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert 0 < sum(read) <= 2 * (header + 8) < file.stat().st_size / 5
    assert storage.list_names(f"{there}/out") == []


def test_what_is_no_checkpoint_is_refused_with_its_name(base: Path, file: Path, tmp_path: Path):
    unet = changed(file, tmp_path / "unet.safetensors", drop="first_stage_model.")
    put_configs_beside(base, unet)
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "text_encoder/model.safetensors").unlink()
    for source, error, reason in (
        (unet, ImportCheckpointError, r"unet\.safetensors' holds no autoencoder"),
        (tmp_path / "none.safetensors", FileNotFoundError, "does not exist"),
        (tmp_path / "one.ckpt", ImportCheckpointError, "is a pickle"),
        (broken, BaseModelError, "has no safetensors in text_encoder/"),
        (tmp_path / "nothing", BaseModelError, "No directory"),
    ):
        config = ImportCheckpointConfig(source=str(source), output=str(tmp_path / "out"))
        for call in (check_checkpoint_import, import_checkpoint):
            with pytest.raises(error, match=reason):
                call(config)
    assert not (tmp_path / "out").exists()


def test_sdxl_is_imported_with_both_text_encoders(tmp_path: Path):
    base = write_tiny(tmp_path / "base", "sdxl")
    out = imported(write_file(base, tmp_path / "xl.safetensors"), tmp_path / "out")
    assert_equal(tensors_of(resolve_base(str(out))), tensors_of(resolve_base(str(base))))
