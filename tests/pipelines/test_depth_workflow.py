"""Image to depth by one command on the real stack, with a tiny model: scenes, decoder, latents, model, maps, errors."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2f_core.content import hash_directory
from d2f_core.data.depth_dataset import MakeDepthConfig
from d2f_core.inference.depth_evaluation import EvaluateDepthConfig
from d2f_core.inference.depth_plan import PredictDepthConfig
from d2f_core.inference.encode_config import EncodeDepthConfig
from d2f_core.inference.register import RegisterConfig
from d2f_core.model.artifact import SamplingDefaults
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.latent_task import ModelConfig
from d2f_core.storage import read_bytes
from d2f_core.train.config import TrainConfig
from pipelines.cli import from_yaml, resolve, to_yaml
from pipelines.configs import FinetuneConfig, TrainAutoencoderConfig
from pipelines.depth import DepthConfig
from pipelines.workflow import main
from pipelines.workflow_recipes import DEPTH

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]
HOME = "s3://d2f/test-depth-workflow"
STAGES = [
    "make_dataset", "make_test_dataset", "train_autoencoder", "encode_depth", "finetune", "register", "predict_depth",
    "evaluate_depth",
]  # fmt: skip
TRAIN = TrainConfig(
    num_steps=2, global_batch_size=4, micro_batch_size=4, threads_per_worker=1, zero_stage=0,
    learning_rate=1e-2, log_every=1, checkpoint_every=2, evaluate_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(base: str) -> DepthConfig:
    made = f"{HOME}/decoder/base"
    return DepthConfig(
        output=f"{HOME}/workflow",
        dataset=MakeDepthConfig(output=f"{HOME}/scenes", size=16, num_scenes=12, num_tasks=1),
        test=MakeDepthConfig(output=f"{HOME}/test", split="test", size=16, num_scenes=3, num_tasks=1),
        decoder=TrainAutoencoderConfig(
            base=base, images=f"{HOME}/scenes", output=f"{HOME}/decoder", holdout_rows=4, train=TRAIN
        ),
        encode=EncodeDepthConfig(resolution=16, output=f"{HOME}/latents", num_actors=1),
        finetune=FinetuneConfig(
            model=ModelConfig(base=made, task="image_to_depth", method="full", caption_dropout=0.0),
            latents="",
            output=f"{HOME}/run",
            holdout_rows=4,
            sampling=SamplingDefaults(steps=2, guidance=1.0),
            train=dataclasses.replace(TRAIN, evaluate_every=0),
            experiment="depth workflow tests",
        ),
        register=RegisterConfig(name="depth-workflow"),
        predict=PredictDepthConfig(steps=(1, 2), ensemble=1, num_actors=1, experiment=""),
        evaluate=EvaluateDepthConfig(replicates=20, shown=1, experiment=""),
    )


@pytest.fixture(scope="module")
def first(config: DepthConfig) -> dict[str, Any]:
    main(config)
    return summary(config)


def summary(config: DepthConfig) -> dict[str, Any]:
    return json.loads(read_bytes(f"{config.output}/summary.json"))


def test_one_job_makes_everything_and_measures_it(config: DepthConfig, first: dict[str, Any]) -> None:
    assert [stage["name"] for stage in first["stages"]] == STAGES
    amounts = {stage["name"]: stage["rows_or_steps"] for stage in first["stages"]}
    assert (amounts["make_dataset"], amounts["encode_depth"], amounts["evaluate_depth"]) == (12, 12, 3)
    assert (first["registered_model"], first["model_version"]) == ("depth-workflow", "1") and first["run_id"]
    assert read_bytes(first["contact_sheet"]).startswith(b"\x89PNG")
    found = json.loads(read_bytes(f"{config.output}/evaluation/depth_metrics.json"))
    (role,) = found["metrics"]["abs_rel"]["values"].keys() - {"constant", "vertical ramp", "mean depth"}
    assert set(found["metrics"]["abs_rel"]["values"][role]) == {"1", "2"}


def test_the_decoder_learned_while_all_latents_stayed(config: DepthConfig, first: dict[str, Any], base: str) -> None:
    before, after = resolve_base(base), resolve_base(config.finetune.model.base)
    old, new = (load_file(next((each.path / "vae").glob("*.safetensors"))) for each in (before, after))
    assert old.keys() == new.keys()
    kept = {name for name in old if torch.equal(old[name].float(), new[name].float())}
    assert kept == {name for name in old if name.startswith(("encoder.", "quant_conv."))}
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mine, theirs = (torch.stack(load_autoencoder(each).encode(pixels)) for each in (after, before))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert hash_directory(after.path / "unet") == hash_directory(before.path / "unet")


def test_the_same_command_again_skips_everything(config: DepthConfig, first: dict[str, Any]) -> None:
    main(config)
    assert [stage["name"] for stage in summary(config)["stages"] if stage["skipped"]] == STAGES


def test_stages_that_do_not_fit_together_are_refused(config: DepthConfig, base: str) -> None:
    other = dataclasses.replace(config.finetune, model=dataclasses.replace(config.finetune.model, base=base))
    with pytest.raises(ValueError, match=r"finetune\.model\.base=.* is not decoder\.output/base="):
        dataclasses.replace(config, finetune=other)
    dataclasses.replace(config, finetune=other, decoder=None)


@pytest.mark.parametrize("decoder", [True, False])
def test_the_printed_config_is_read_back(decoder: bool) -> None:
    config = DEPTH if decoder else dataclasses.replace(DEPTH, decoder=None)
    assert from_yaml(DepthConfig, to_yaml(config), source="printed") == config


def test_every_part_has_flags() -> None:
    config, _ = resolve("workflow", {"depth": DEPTH}, ["depth", "--decoder.train.num-steps", "7", "--test.seed", "1"])
    assert config.decoder and config.decoder.train.num_steps == 7 and config.test.seed == 1
