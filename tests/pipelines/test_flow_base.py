"""A rectified-flow checkpoint as the base of every job, and one whose config lies, on real servers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from d2f_core.batch.output import read_index
from d2f_core.flow.evaluate.compared_models import make_compared_model
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate, generate
from d2f_core.model.artifact import load_model, read_description
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModelError, local_copy, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.storage import read_bytes, upload_tree, write_bytes
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.launch import TrainingStoppedError
from pipelines.configs import FinetuneConfig
from pipelines.finetune import check, main
from pipelines.training import TrainingResult
from tests.flow.here import here
from tests.latent_tables import write_latents
from tests.model.single_file.files import write_file
from tests.model.tiny_sd import write_tiny

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]
HOME = "s3://d2f/test-flow-base"
EMOJI_SD = Path("infra/models/emoji-sd").absolute()


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A single file in a bucket, which says itself what it predicts and at which shift it is sampled."""
    home = tmp_path_factory.mktemp("flow")
    base = write_tiny(home / "base", "sd15")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(base / "scheduler")
    file = write_file(base, home / "file" / "rf.safetensors", scheduler=False)
    upload_tree(file.parent, f"{HOME}/base")
    return f"{HOME}/base/rf.safetensors"


@pytest.fixture(scope="module")
def config(flow_base: str) -> FinetuneConfig:
    write_latents(
        f"{HOME}/latents", autoencoder_fingerprint(resolve_base(flow_base)), rows=16, rows_per_file=8, captions=16
    )
    return FinetuneConfig(
        model=ModelConfig(base=flow_base, method="lora", lora=LoraConfig(rank=2)),
        latents=f"{HOME}/latents",
        output=f"{HOME}/run",
        holdout_rows=4,
        preview=PreviewConfig(prompts=("thing 1",), steps=2),
        sampling=SamplingDefaults(steps=4, shift=3.0, guidance=1.0),
        train=TrainConfig(
            num_steps=4, global_batch_size=4, micro_batch_size=2, num_workers=2, threads_per_worker=1, zero_stage=2,
            learning_rate=1e-2, ema=EmaConfig(decay=0.9), checkpoint_every=2, evaluate_every=4, evaluate_on="workers",
        ),
        experiment="test-flow-base",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: FinetuneConfig) -> TrainingResult:
    return main(config)


def prompts() -> str:
    rows = [{"prompt": f"thing {number}", "sample_id": f"id{number}"} for number in range(3)]
    write_bytes(f"{HOME}/prompts.jsonl", "\n".join(map(json.dumps, rows)).encode())
    return f"{HOME}/prompts.jsonl"


def test_a_training_on_it_is_a_model_that_says_so(config: FinetuneConfig, trained: TrainingResult) -> None:
    description = read_description(local_copy(trained.model))
    assert (description["format_version"], description["prediction_type"]) == (2, "flow_prediction")
    assert json.loads(read_bytes(f"{config.output}/base_reading.json")) == description["training"]["base_reading"]
    assert description["training"]["base_reading"].keys() == {"epsilon", "v_prediction", "sample", "flow_prediction"}
    assert load_model(trained.model).puts_out_velocity


@pytest.mark.parametrize("which", ["trained", "base"])
def test_both_draw_by_euler_at_the_shift_that_they_carry(flow_base: str, trained: TrainingResult, which: str) -> None:
    model = trained.model if which == "trained" else flow_base
    drawing = GenerateConfig(prompts=prompts(), model=model, output=f"{HOME}/{which}", steps=(2,), num_actors=1)
    with here():
        generate(check_generate(drawing))
    rows = read_index(drawing.output).to_pylist()
    assert [(row["solver"], row["error"]) for row in rows] == [("euler", None)] * 3
    assert {row["shift"] for row in rows} == {3.0}


def test_an_evaluation_draws_a_flow_base_by_euler_whatever_its_base_solver(
    flow_base: str, trained: TrainingResult
) -> None:
    comparing = EvaluateConfig(prompts=prompts(), output=f"{HOME}/evaluation", evaluations=(2,), guidance=1.0)
    for role, uri in (("base", flow_base), ("candidate", trained.model), ("candidate", flow_base)):
        assert make_compared_model(comparing, role, uri, None).job.plan.solver == "euler"


def lying(target: Path) -> Path:
    """emoji-sd, which predicts epsilon, with a config that says v."""
    shutil.copytree(EMOJI_SD, target)
    file = target / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    return target


def test_a_base_whose_config_lies_ends_the_training_before_its_first_step(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    base = str(lying(tmp_path / "base"))
    latents = f"{HOME}/emoji-latents"
    fingerprint = autoencoder_fingerprint(resolve_base(base))
    write_latents(latents, fingerprint, rows=8, rows_per_file=8, captions=8, shape=(4, 16, 16), pixels=64)
    wrong = dataclasses.replace(
        config, model=dataclasses.replace(config.model, base=base), latents=latents, output=f"{HOME}/lying"
    )
    check(wrong)  # weights are not asked where the command was given
    with pytest.raises(
        (BaseModelError, TrainingStoppedError), match=r"network of epsilon does.*--model\.base-prediction"
    ):
        main(wrong)
