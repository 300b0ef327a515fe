"""A version's page stays within what MLflow keeps, and names the files that hold the rest."""

import copy
from typing import Any

import pytest

from d2f_core.flow.publish.model_card import write_card
from d2f_core.model.artifact import describe
from d2f_core.model.base import resolve_base
from d2f_core.model.config import SamplingDefaults
from d2f_core.tracking.publish import TrainingRecord
from d2f_core.tracking.registry import MAX_DESCRIPTION_CHARS
from tests.flow.tiny_base import write_tiny_base

URI = "models:/m@candidate"


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = resolve_base(str(write_tiny_base(tmp_path_factory.mktemp("base"))))
    sampling = SamplingDefaults()
    return describe(base, objective="diff2flow", method="lora", sampling=sampling, training={"step": 4})


def record(config_yaml: str) -> TrainingRecord:
    run = {"run": "s3://d2f/run", "run_url": "http://mlflow/run", "tags": {}, "metrics": {}}
    return TrainingRecord(**run, config_yaml=config_yaml, has_samples=False)


def test_a_short_card_is_the_versions_page(description: dict[str, Any]) -> None:
    card = write_card(description, record("train: 1\n"), URI)
    assert card.description == card.text and "artifacts/model/" not in card.text
    assert "None were logged at its step." in card.text


@pytest.mark.parametrize("lines", [1, 400], ids=["short", "long"])
def test_a_long_config_is_left_to_the_files_and_the_page_says_where(description: dict[str, Any], lines: int) -> None:
    config = "a_setting: of some length\n" * lines
    card = write_card(description, record(config), URI)
    assert config in card.text and len(card.description) <= MAX_DESCRIPTION_CHARS
    pointer = "In this version's files, artifacts/model/: config.yaml."
    assert (config in card.description, pointer in card.description) == (lines == 1, lines > 1)


def test_a_table_of_betas_is_not_written_out(description: dict[str, Any]) -> None:
    other = copy.deepcopy(description)
    other["schedule"]["trained_betas"] = [0.001 * number for number in range(1000)]
    assert "Scheduler config of the base" in write_card(description, record(""), URI).text
    assert "Scheduler config of the base" not in write_card(other, record(""), URI).text


def test_a_summary_beyond_what_mlflow_keeps_is_cut_before_the_line_about_the_files(description: dict[str, Any]) -> None:
    long = {**description, "training": {f"table_{number}": "s3://bucket/latents" for number in range(200)}}
    page = write_card(long, record("train: 1\n"), URI).description
    assert len(page) == MAX_DESCRIPTION_CHARS
    assert page.endswith("artifacts/model/: the scheduler config (diff2flow.json), config.yaml.\n")
