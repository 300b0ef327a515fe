"""Image to depth by one command with real servers and a tiny model: scenes, decoder, latents, model, maps, errors."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2f_core.hashing import hash_directory
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.storage import read_bytes
from pipelines.cli import from_yaml, resolve, to_yaml
from pipelines.workflow import main
from pipelines.workflow_config import DepthConfig
from pipelines.workflow_recipes import DEPTH
from tests.pipelines.depth_workflow import depth_config
from tests.slow import slow

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]
STAGES = [
    "make_dataset", "make_test_dataset", "train_autoencoder", "encode_depth", "finetune", "register", "predict_depth",
    "evaluate_depth",
]  # fmt: skip


def summary(config: DepthConfig) -> dict[str, Any]:
    return json.loads(read_bytes(f"{config.output}/summary.json"))


def test_one_job_makes_everything_and_measures_it(depth_workflow: DepthConfig, depth_made: dict[str, Any]) -> None:
    assert [stage["name"] for stage in depth_made["stages"]] == STAGES
    amounts = {stage["name"]: stage["rows_or_steps"] for stage in depth_made["stages"]}
    assert (amounts["make_dataset"], amounts["encode_depth"], amounts["evaluate_depth"]) == (12, 12, 3)
    assert (depth_made["registered_model"], depth_made["model_version"]) == ("depth-workflow", "1")
    assert depth_made["run_id"]
    assert read_bytes(depth_made["contact_sheet"]).startswith(b"\x89PNG")
    found = json.loads(read_bytes(f"{depth_workflow.output}/evaluation/depth_metrics.json"))
    (role,) = found["metrics"]["abs_rel"]["values"].keys() - {"constant", "vertical ramp", "mean depth"}
    assert set(found["metrics"]["abs_rel"]["values"][role]) == {"1", "2"}


def test_the_decoder_learned_while_all_latents_stayed(
    depth_workflow: DepthConfig, depth_made: dict[str, Any], base: str
) -> None:
    before, after = resolve_base(base), resolve_base(depth_workflow.finetune.model.base)
    old, new = (load_file(next((each.path / "vae").glob("*.safetensors"))) for each in (before, after))
    assert old.keys() == new.keys()
    kept = {name for name in old if torch.equal(old[name].float(), new[name].float())}
    assert kept == {name for name in old if name.startswith(("encoder.", "quant_conv."))}
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mine, theirs = (torch.stack(load_autoencoder(each).encode(pixels)) for each in (after, before))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert hash_directory(after.path / "unet") == hash_directory(before.path / "unet")


def test_the_same_command_again_skips_everything(depth_workflow: DepthConfig, depth_made: dict[str, Any]) -> None:
    main(depth_workflow)
    assert [stage["name"] for stage in summary(depth_workflow)["stages"] if stage["skipped"]] == STAGES


def test_stages_that_do_not_fit_together_are_refused(depth_workflow: DepthConfig, base: str) -> None:
    other = dataclasses.replace(
        depth_workflow.finetune, model=dataclasses.replace(depth_workflow.finetune.model, base=base)
    )
    with pytest.raises(ValueError, match=r"finetune\.model\.base=.* is not decoder\.output/base="):
        dataclasses.replace(depth_workflow, finetune=other)
    dataclasses.replace(depth_workflow, finetune=other, decoder=None)


@slow("two minutes: the same workflow, trained in this process, stays, and the rails are run by test_finetune.py")
def test_it_runs_on_the_cluster(base: str) -> None:
    config = depth_config(base, "s3://d2f/test-depth-workflow-on-cluster")
    main(config)
    assert [stage["name"] for stage in summary(config)["stages"]] == STAGES


@pytest.mark.parametrize("decoder", [True, False])
def test_the_printed_config_is_read_back(decoder: bool) -> None:
    config = DEPTH if decoder else dataclasses.replace(DEPTH, decoder=None)
    assert from_yaml(DepthConfig, to_yaml(config), source="printed") == config


def test_every_part_has_flags() -> None:
    config, _ = resolve("workflow", {"depth": DEPTH}, ["depth", "--decoder.train.num-steps", "7", "--test.seed", "1"])
    assert config.decoder and config.decoder.train.num_steps == 7 and config.test.seed == 1
