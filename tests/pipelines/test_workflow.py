"""The whole workflow on real servers with a tiny model: every stage once, killed anywhere it goes on, and adds up."""

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from d2f_core.batch.output import read_index
from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.data.manifest import read_manifest
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.model.artifact import DESCRIPTION, load_model
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.storage import exists, list_names, read_bytes
from d2f_core.tracking import find_run, pin_model, resolve_model
from d2f_core.tracking.server import client_for
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.cli import to_yaml
from pipelines.configs import FinetuneConfig
from pipelines.workflow import main
from pipelines.workflow_config import WorkflowConfig
from tests.flow.here import here
from tests.slow import slow

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("cluster")]
ROOT = Path(__file__).parents[2]
HOME = "s3://d2f/tests/workflow"
EDGE = 24
"""Not the tiny base's own 16 pixels: the model learns a new resolution too."""
STAGES = [
    "make_dataset",
    "encode_latents",
    "finetune",
    "register",
    "generate",
    "contact_sheet",
]


def workflow(name: str, base: str) -> WorkflowConfig:
    train = TrainConfig(
        num_steps=4, global_batch_size=4, micro_batch_size=4, threads_per_worker=1, zero_stage=0,
        ema=EmaConfig(decay=0.9), log_every=1, checkpoint_every=2, evaluate_every=0,
    )  # fmt: skip
    return WorkflowConfig(
        output=f"{HOME}/{name}",
        dataset=MakeDatasetConfig(size=EDGE, output=f"{HOME}/{name}-images"),
        encode=EncodeConfig(resolution=EDGE, output=f"{HOME}/{name}-latents", rows_per_part=64, num_actors=1),
        finetune=FinetuneConfig(
            model=ModelConfig(base=base, lora=LoraConfig(rank=2)),
            latents=f"{HOME}/{name}-latents",
            output=f"{HOME}/{name}-run",
            holdout_rows=4,
            sampling=SamplingDefaults(steps=3, guidance=2.0),
            train=train,
            experiment="workflow tests",
        ),
        register=RegisterConfig(name=f"flow-{name}"),
        generate=GenerateConfig(steps=(1, 2), chunk_size=1, num_actors=1),
        prompts=("red apple", "cat face", "rocket"),
    )


@pytest.fixture(scope="module")
def config(base: str) -> WorkflowConfig:
    return workflow("unbroken", base)


def summary(config: WorkflowConfig) -> dict[str, Any]:
    return json.loads(read_bytes(f"{config.output}/summary.json"))


@pytest.fixture(scope="module")
def first(config: WorkflowConfig) -> dict[str, Any]:
    main(config)
    return summary(config)


def skipped(report: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in report["stages"] if stage["skipped"]]


def test_one_job_makes_everything_and_says_what(config: WorkflowConfig, first: dict[str, Any]) -> None:
    assert [stage["name"] for stage in first["stages"]] == STAGES and not skipped(first)
    amounts = {stage["name"]: (stage["rows_or_steps"], stage["unit"]) for stage in first["stages"]}
    images = read_manifest(config.dataset.output).num_rows
    assert amounts["make_dataset"] == amounts["encode_latents"] == (images, "images")
    assert amounts["finetune"] == (4, "steps") and amounts["generate"] == (12, "images")
    handle = find_run(experiment="workflow tests", run_key=config.finetune.output)
    assert handle and (first["run_id"], first["experiment_id"]) == (handle.run_id, handle.experiment_id)
    assert (first["registered_model"], first["model_version"]) == ("flow-unbroken", "1")
    sheet = Image.open(io.BytesIO(read_bytes(first["contact_sheet"])))
    assert sheet.width > 260 + 4 * 160 and sheet.height > 3 * 160


def test_base_and_flow_are_sampled_as_their_models_say(config: WorkflowConfig, first: dict[str, Any]) -> None:
    base, flow = (
        read_index(f"{config.output}/generations/{name}").to_pylist()
        for name in sorted(list_names(f"{config.output}/generations"))
    )
    assert {(row["solver"], row["guidance"]) for row in base} == {("ddim", 3.0)}
    assert {(row["solver"], row["guidance"]) for row in flow} == {("euler", 2.0)}
    assert {row["model_uri"] for row in flow} == {"models:/flow-unbroken/1"}
    assert [row["sample_id"] for row in base] == [row["sample_id"] for row in flow]


def test_both_draw_the_new_size_and_the_model_carries_it(config: WorkflowConfig, first: dict[str, Any]) -> None:
    for name in list_names(f"{config.output}/generations"):
        for row in read_index(f"{config.output}/generations/{name}").to_pylist():
            assert Image.open(io.BytesIO(read_bytes(row["image_uri"]))).size == (EDGE, EDGE)
    description = json.loads(Path(resolve_model("models:/flow-unbroken/1"), DESCRIPTION).read_text())
    assert description["sampling"]["resolution"] == EDGE
    assert load_model(resolve_model("models:/flow-unbroken/1")).default_size == (EDGE, EDGE)


def test_the_registered_model_says_how_to_use_it(config: WorkflowConfig, first: dict[str, Any]) -> None:
    assert pin_model("models:/flow-unbroken@candidate") == "models:/flow-unbroken/1"
    assert (Path(resolve_model("models:/flow-unbroken/1")) / "adapter/adapter_model.safetensors").is_file()
    handle = find_run(experiment="workflow tests", run_key=config.finetune.output)
    assert handle
    version = client_for(handle.tracking_uri).get_model_version("flow-unbroken", "1")
    wanted = {"objective": "diff2flow", "method": "lora", "prediction_type": "epsilon", "solver": "euler", "steps": "3"}
    assert wanted.items() <= version.tags.items() and version.tags["base_uri"] == config.finetune.model.base
    assert "| prediction_type | epsilon |" in (version.description or "")


def test_the_same_command_again_skips_everything(config: WorkflowConfig, first: dict[str, Any]) -> None:
    main(config)
    again = summary(config)
    assert skipped(again) == STAGES
    assert [stage["rows_or_steps"] for stage in again["stages"]] == [s["rows_or_steps"] for s in first["stages"]]


def test_only_what_depends_on_a_change_runs_again(config: WorkflowConfig, first: dict[str, Any]) -> None:
    with here():
        main(replace(config, prompts=(*config.prompts, "snowman")))
    assert skipped(summary(config)) == STAGES[:4]


def test_stages_that_do_not_fit_together_are_refused(config: WorkflowConfig) -> None:
    with pytest.raises(ValueError, match=r"finetune\.latents='s3://d2f/other' is not encode\.output="):
        replace(config, finetune=replace(config.finetune, latents="s3://d2f/other"))


def until(done: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


@slow("90 s: each stage's own resume stays, in its test file, and a finished workflow skips everything above")
def test_killed_in_several_stages_it_ends_with_the_same_outputs(
    base: str, config: WorkflowConfig, first: dict[str, Any], tmp_path: Path
) -> None:
    killed = workflow("killed", base)
    (tmp_path / "workflow.yaml").write_text(to_yaml(killed))
    command = [sys.executable, "-m", "pipelines.workflow", "--config", str(tmp_path / "workflow.yaml")]
    moments = [
        lambda: exists(f"{killed.output}/make_dataset.json"),
        lambda: bool(list_names(killed.finetune.output)),
        lambda: exists(f"{killed.output}/register.json"),
    ]
    for number, moment in enumerate(moments):
        log = tmp_path / f"{number}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            until(moment, process, log)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not exists(f"{killed.output}/summary.json"), "killed too late to prove anything"
    main(killed)
    report = summary(killed)
    assert {"make_dataset", "encode_latents", "finetune", "register"} <= set(skipped(report))
    assert [stage["rows_or_steps"] for stage in report["stages"]] == [s["rows_or_steps"] for s in first["stages"]]
    for one, other in ((killed.dataset, config.dataset), (killed.encode, config.encode)):
        assert read_manifest(one.output).digest == read_manifest(other.output).digest
    assert report["model_version"] == "1", "registered once"
