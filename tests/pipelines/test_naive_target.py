"""A naive run that began before its target was a field keeps the published one, whichever command resumes it."""

import dataclasses
import logging
from pathlib import Path

import pytest
import yaml

from d2f_core.data.manifest import read_manifest
from d2f_core.model.artifact import load_model, read_description
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.train.checkpoint import CheckpointError
from pipelines.checkpoint_export import export_checkpoint
from pipelines.configs import FinetuneConfig
from pipelines.export_config import CheckpointExportConfig
from pipelines.finetune import check
from tests.flow.tiny_base import write_tiny_base
from tests.latent_tables import write_latents
from tests.pipelines.test_checkpoint_export import configured, write_run


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.finetune_job.check_tracking", lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    """What the command says today."""
    base, latents = str(write_tiny_base(tmp_path / "base")), str(tmp_path / "latents")
    write_latents(latents, autoencoder_fingerprint(resolve_base(base)), rows=8, rows_per_file=8, captions=8)
    return configured(base, latents, tmp_path / "run", method="full", objective="flow_matching")


def begin_as_before(config: FinetuneConfig) -> FinetuneConfig:
    """A run as a release without the field left it; returns what it trained."""
    published = dataclasses.replace(config.model, naive_target="data_minus_noise")
    write_run(dataclasses.replace(config, model=published), 2)
    file = Path(config.output) / "config.yaml"
    written = yaml.safe_load(file.read_text())
    del written["model"]["naive_target"]
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    return dataclasses.replace(config, model=published)


def test_the_command_that_began_it_goes_on_with_its_target(
    config: FinetuneConfig, caplog: pytest.LogCaptureFixture
) -> None:
    published = begin_as_before(config)
    with caplog.at_level(logging.WARNING):
        checked = check(config)
    assert checked.config.model.naive_target == "data_minus_noise"
    base_hash, manifests = checked.base.content_hash, [read_manifest(config.latents)]
    assert checked.identity == published.identity(base_hash, manifests)
    assert "began with naive_target=data_minus_noise and goes on so" in caplog.text


def test_its_checkpoints_are_exported_as_what_they_are(config: FinetuneConfig, tmp_path: Path) -> None:
    begin_as_before(config)
    target = tmp_path / "model"
    export_checkpoint(CheckpointExportConfig(run=config.output, output=str(target)))
    assert read_description(target)["format_version"] == 1
    assert load_model(str(target)).naive_target == "data_minus_noise"


def test_a_new_run_has_the_new_target_and_says_so(config: FinetuneConfig, tmp_path: Path) -> None:
    write_run(config, 2)
    assert check(config).config.model.naive_target == "noise_minus_data"
    target = tmp_path / "model"
    export_checkpoint(CheckpointExportConfig(run=config.output, output=str(target)))
    assert load_model(str(target)).naive_target == "noise_minus_data"


def test_another_loss_at_its_output_is_refused_as_ever(config: FinetuneConfig) -> None:
    begin_as_before(config)
    with pytest.raises(CheckpointError):
        check(dataclasses.replace(config, model=dataclasses.replace(config.model, objective="diff2flow")))
