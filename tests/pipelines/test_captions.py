"""How captions are read goes from the table to the training, its identity, its model and what the model draws."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import read_manifest
from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.evaluate.compared_models import make_compared_model, unequal
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.model.artifact import describe_model, read_description
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.caption_rules import CaptionRules, written_rules
from d2f_core.model.config import LoraConfig, PreviewConfig
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.model.text_to_image import TextToImage
from pipelines.checkpoint_export import export_checkpoint
from pipelines.configs import FinetuneConfig
from pipelines.export_config import CheckpointExportConfig
from pipelines.finetune import check
from pipelines.workflow_recipes import PHOTOS
from tests.latent_tables import write_latents
from tests.model.artifacts import trained
from tests.model.tiny_sd import write_tiny
from tests.pipelines.test_checkpoint_export import configured, write_run
from tests.train_here import rows_of

RULES = CaptionRules(chunks=2, clip_skip=1)


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.finetune_job.check_tracking", lambda: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("sd15") / "base", "sd15"))


def config_on(base: str, place: Path, rules: CaptionRules, **model) -> FinetuneConfig:
    uri, autoencoder = str(place / "latents"), autoencoder_fingerprint(resolve_base(base))
    properties = written_rules(rules)
    write_latents(uri, autoencoder, rows=8, rows_per_file=8, pixels=64, captions=8, properties=properties)
    return configured(base, uri, place / "run", lora=LoraConfig(rank=2), **model)


def test_a_training_and_its_model_read_captions_as_the_table_says(base: str, tmp_path: Path) -> None:
    checked = check(config_on(base, tmp_path, RULES))
    config = checked.config
    assert config.model.captions == RULES
    manifests, other = [read_manifest(config.latents)], dataclasses.replace(config.model, captions=CaptionRules())
    assert checked.identity == config.identity(checked.base.content_hash, manifests)
    without = dataclasses.replace(config, model=other)
    assert checked.identity != without.identity(checked.base.content_hash, manifests)
    task = TextToImage(resolve_base(base), config.model, seed=0, dtype=torch.float32, device="cpu")
    expected = load_text_encoder(resolve_base(base).read_captions(RULES)).encode(["a cat"])
    torch.testing.assert_close(task.condition(["a cat"])["text_states"], expected, rtol=0, atol=1e-6)
    arrays = table_to_arrays(next(rows_of(checked.plan)))
    assert task.loss(task.module, task.to_batch(arrays)).isfinite().all()
    (picture,) = task.preview(task.module, PreviewConfig(steps=1), ["a cat"])
    assert picture.size == (64, 64)
    write_run(config, 2)
    export_checkpoint(CheckpointExportConfig(run=config.output, output=str(tmp_path / "model")))
    assert describe_model(str(tmp_path / "model")).base.captions == RULES


def test_a_table_that_says_nothing_leaves_it_to_the_config_and_every_identity_as_it_was(
    base: str, tmp_path: Path
) -> None:
    plain = config_on(base, tmp_path, CaptionRules())
    assert check(plain).config == plain
    write_run(plain, 2)
    export_checkpoint(CheckpointExportConfig(run=plain.output, output=str(tmp_path / "model")))
    assert "captions" not in read_description(tmp_path / "model")
    asked = dataclasses.replace(plain.model, captions=RULES)
    elsewhere = dataclasses.replace(plain, output=str(tmp_path / "other"), model=asked)
    assert check(elsewhere).config.model.captions == RULES and check(elsewhere).identity != check(plain).identity


def test_a_start_that_reads_captions_otherwise_is_refused_before_anything_starts(base: str, tmp_path: Path) -> None:
    start = trained(Path(base), tmp_path / "start", LoraConfig(rank=2), captions=CaptionRules(chunks=3), probe=False)
    with pytest.raises(ValueError, match=r"reads captions by chunks=3, clip_skip=0, and this training by chunks=2"):
        check(config_on(base, tmp_path, RULES, start=start))


def test_layers_that_the_encoder_does_not_have_are_refused_before_anything_starts(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip_skip=3, and of its text encoder at most 2 layers"):
        check(config_on(base, tmp_path, CaptionRules(), captions=CaptionRules(clip_skip=3)))


def test_pairs_and_evaluations_say_how_their_models_read_captions(base: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "cat"}))
    settings = {"evaluations": (2,), "guidance": 1.0, "output": str(tmp_path / "out")}
    config = EvaluateConfig(prompts=str(tmp_path / "prompts.jsonl"), **settings)
    compared = []
    for role, rules in (("candidate", RULES), ("champion", CaptionRules())):
        model = trained(Path(base), tmp_path / role, LoraConfig(rank=2), captions=rules, probe=False)
        compared.append(make_compared_model(config, role, model, None))
        latents = compared[-1].job.latents
        assert {"captions": latents.get("captions")} == {"captions": None, **written_rules(rules)}
    note, *_ = unequal(compared)
    assert note.startswith("prompts are read differently: candidate chunks=2, clip_skip=1, champion chunks=1,")


def test_a_workflow_gives_the_rules_of_its_encoding_to_the_stages_around_it() -> None:
    recipe = PHOTOS["photos"]
    config = dataclasses.replace(recipe, encode=dataclasses.replace(recipe.encode, captions=RULES))
    wired = config.wired_images(), config.wired_encode(), config.wired_finetune().model
    assert [each.captions for each in wired] == [RULES] * 3
    own = dataclasses.replace(recipe.finetune, model=dataclasses.replace(recipe.finetune.model, captions=RULES))
    given = {"name": "n", "base": "b", "source": ImageSource(uri="s")}
    with pytest.raises(ValueError, match=r"finetune\.model\.captions=.* is filled in by this workflow"):
        dataclasses.replace(recipe, **given, finetune=own).check_complete()
