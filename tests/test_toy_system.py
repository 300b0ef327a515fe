"""A second system runs on the rails from its images to a registered version, and writes a hundred lines for it."""

import dataclasses
import functools
import re
from pathlib import Path

import mlflow
import pytest

from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import make_table
from d2f_core.data.manifest import read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.tracking import resolve_model
from d2f_core.train.config import TrainConfig
from d2f_core.train.task import Evaluation, Task
from pipelines.cli import UnfinishedError
from pipelines.training import train
from tests.data.pictures import pictures, write_folder
from tests.toy_system import BrightnessConfig, ColourConfig, build_task, check_brightness, check_colours, register

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table(cluster: None) -> ColourConfig:
    source = write_folder("s3://d2f/datasets/toy", [*pictures(20), ("broken.png", b"no image", "x")])
    config = ColourConfig(source=source, output="s3://d2f/toy/colours")
    make_table(check_colours(config))
    return config


def test_the_whole_system_from_images_to_a_version(table: ColourConfig, tmp_path: Path) -> None:
    config, made = table, read_manifest(table.output)
    assert made.counts == {"read": 21, "written": 20, "quarantined": 1, "duplicates": 0} and made.kind == "colours"
    assert [bad.code for bad in read_quarantine(config.output)] == ["undecodable"]
    assert make_table(check_colours(config)) == made, "nothing is left to do"
    with pytest.raises(OutputError, match="rows_per_part was 4, now 5"):
        make_table(check_colours(dataclasses.replace(config, rows_per_part=5)))

    steps = TrainConfig(
        num_steps=60, global_batch_size=8, micro_batch_size=8, learning_rate=0.05, lanes=1, checkpoint_every=60,
        evaluate_every=60, keep_best=1, keep_best_metric="within@0.05", keep_best_lower_is_better=False,
    )  # fmt: skip
    training = BrightnessConfig(colours=config.output, output="s3://d2f/toy/brightness", train=steps)
    result = train(check_brightness(training))
    assert result.run is not None and result.step == 60
    assert train(check_brightness(training)).checkpoint == result.checkpoint, "nothing is left to train"

    version = register(training, result, tmp_path / "model")
    assert version.tags["task"] == "brightness"
    client = mlflow.MlflowClient()
    registered = client.get_model_version(version.name, version.version)
    assert client.get_logged_model((registered.source or "").removeprefix("models:/")).model_type == "toy"
    page = registered.description or ""
    assert re.fullmatch(r"Brightness from a mean colour; \d+% of the held-out images within 0\.05\.", page)
    files = Path(resolve_model(version.uri, cache_dir=tmp_path)).iterdir()
    assert sorted(file.name for file in files) == ["README.md", "brightness.safetensors", "config.yaml"]


def build_without_evaluation(config: BrightnessConfig, device: str) -> Task:
    def broken() -> Evaluation:
        raise RuntimeError("no room on the device")

    return dataclasses.replace(build_task(config, device), evaluate=broken)


def test_a_training_that_owes_evaluations_says_so_and_the_same_command_makes_them_up(table: ColourConfig) -> None:
    config = BrightnessConfig(
        colours=table.output,
        output="s3://d2f/toy/owed",
        train=TrainConfig(num_steps=2, global_batch_size=8, micro_batch_size=8, lanes=1, checkpoint_every=1),
    )
    job = check_brightness(config)
    result = train(dataclasses.replace(job, build_task=functools.partial(build_without_evaluation, config)))
    assert result.owed == (0, 2) and result.step == 2
    with pytest.raises(UnfinishedError, match=r"trained to step 2 .* evaluation of step 0, 2 failed"):
        result.complete()
    assert train(job).complete().owed == ()


def test_the_page_shows_the_system_that_runs() -> None:
    page, code = (ROOT / "docs/adding_a_system.md").read_text(), (ROOT / "tests/toy_system.py").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        assert block in code, f"not in tests/toy_system.py:\n{block}"
