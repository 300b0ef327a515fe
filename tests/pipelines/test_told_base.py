"""What the user says of a base's prediction reaches every job that reads the base, and no model trained on it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from d2f_core.flow.evaluate.compared_models import make_compared_model, unequal
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.model.artifact import read_description
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig
from pipelines.checkpoint_export import export_checkpoint
from pipelines.export_config import CheckpointExportConfig
from pipelines.reflow import Teacher, drawing_of
from pipelines.workflow_recipes import REFLOW, WORKFLOW
from tests.flow.tiny_base import write_tiny_base
from tests.latent_tables import write_latents
from tests.model.artifacts import trained
from tests.model.test_flow_base import write_flow_base
from tests.pipelines.test_checkpoint_export import configured, write_run


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "cat"}))
    return str(file)


def test_an_evaluation_draws_the_base_as_it_was_told(tmp_path: Path, prompts: str) -> None:
    base = str(write_tiny_base(tmp_path / "base"))
    model = trained(Path(base), tmp_path / "model", shift=2.0)
    config = EvaluateConfig(prompts=prompts, output=str(tmp_path / "out"), evaluations=(2,), guidance=1.0)
    assert make_compared_model(config, "base", base, None).job.plan.solver == "ddim-clean"
    told = replace(config, base_prediction="flow_prediction")
    drawn = make_compared_model(told, "base", base, None)
    assert (drawn.job.plan.solver, drawn.job.plan.base_prediction) == ("euler", "flow_prediction")
    candidate = make_compared_model(told, "candidate", model, None)
    assert (candidate.job.plan.solver, candidate.job.plan.base_prediction) == ("euler", "")
    assert "the shift of flow times differs: candidate 2 (uniform), base 1 (uniform)" in unequal([candidate, drawn])


def test_a_workflow_draws_the_base_as_told_and_the_model_as_it_says(tmp_path: Path) -> None:
    recipe = WORKFLOW["quickstart"]
    model = replace(recipe.finetune.model, base="b", base_prediction="flow_prediction")
    config = replace(recipe, finetune=replace(recipe.finetune, model=model))
    assert config.wired_generate("b", "o").base_prediction == "flow_prediction"
    assert config.wired_generate("models:/m/1", "o").base_prediction == ""


def test_reflow_draws_from_the_base_as_told_and_from_a_model_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.reflow.write_captions", lambda config, place, seed: "p")
    model = replace(REFLOW.finetune.model, base="b", base_prediction="flow_prediction")
    config = replace(REFLOW, finetune=replace(REFLOW.finetune, model=model))
    assert drawing_of(config, 1, Teacher(uri="b", digest="", start="")).base_prediction == "flow_prediction"
    assert drawing_of(config, 2, Teacher(uri="m", digest="", start="m")).base_prediction == ""


def test_a_model_trained_on_a_flow_base_is_sampled_at_its_shift(tmp_path: Path) -> None:
    from d2f_core.model.autoencoder import autoencoder_fingerprint

    base, latents = str(write_flow_base(tmp_path / "base")), str(tmp_path / "latents")
    write_latents(latents, autoencoder_fingerprint(resolve_base(base)), rows=8, rows_per_file=8, captions=8)
    config = configured(base, latents, tmp_path / "run", lora=LoraConfig(rank=2))
    write_run(config, 2)
    target = tmp_path / "model"
    export_checkpoint(CheckpointExportConfig(run=config.output, output=str(target)))
    assert read_description(target)["sampling"]["shift"] == 3.0
