"""The recipes for SD 1.5, SD 2.1 and SDXL resolve completely on networks of those shapes, and say what is missing."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from d2f_core.data.datasets.emoji import make_dataset
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.estimate.job import estimate as estimated
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.train.checkpoint import KINDS
from infra.local.stack import StackEnv
from pipelines import estimate, finetune
from pipelines.cli import UnfinishedError, resolve, run_job
from pipelines.encode_depth import ENCODE_DEPTH
from pipelines.encode_latents import ENCODE_LATENTS
from pipelines.generate import GENERATE
from pipelines.names import SHOWN_EMOJI
from pipelines.recipes import FINETUNE
from pipelines.recipes_stable_diffusion import ESTIMATE, FINETUNE_STABLE_DIFFUSION
from pipelines.workflow_recipes import REFLOW, WORKFLOW
from tests.depth_tables import write_depth_latents
from tests.latent_tables import write_latents
from tests.model.tiny_sd import Name, write_tiny
from tests.slow import slow

PLACE = "s3://d2f/test-recipes"
NAMES = tuple(FINETUNE_STABLE_DIFFUSION)
TINY_RUN = [
    "--train.no-use-gpu", "--train.num-workers", "1", "--train.num-steps", "2", "--train.global-batch-size", "4",
    "--train.micro-batch-size", "2", "--train.checkpoint-every", "2", "--train.threads-per-worker", "1",
    "--holdout-rows", "4", "--train.learning-rate", "1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def tables(stack: StackEnv, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Recipe -> the flags that give it a tiny base of its shape, and latents of that base."""
    del stack
    flags, bases = {}, {name: write_tiny(tmp_path_factory.mktemp(name), name) for name in get_args(Name)}
    for name, recipe in FINETUNE_STABLE_DIFFUSION.items():
        base = str(bases[recipe.model.base.rpartition("/")[2]])
        fingerprint = autoencoder_fingerprint(resolve_base(base))
        latents = f"{PLACE}/{name}/latents"
        if recipe.model.task == "image_to_depth":
            write_depth_latents(latents, fingerprint, rows=200)
        else:
            write_latents(latents, fingerprint, rows=200, rows_per_file=200, pixels=64, captions=3)
        flags[name] = ["--model.base", base, "--latents", latents, "--output", f"{PLACE}/{name}/run"]
    return flags


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    run_job("finetune", FINETUNE, finetune.main, finetune.check)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_checks_base_and_table_and_prints_the_whole_config(name, tables, monkeypatch, capsys):
    run(monkeypatch, name, *tables[name], "--dry-run")
    printed = capsys.readouterr().out
    assert "inputs were checked, nothing was done" in printed
    config, expected = yaml.safe_load(printed), FINETUNE[name]
    assert config["latents"] == f"{PLACE}/{name}/latents" and config["name"] == name
    assert config["train"]["global_batch_size"] == expected.train.global_batch_size
    assert config["train"]["num_workers"] == 8
    assert config["model"]["method"] == expected.model.method


def test_a_recipe_as_it_stands_names_what_is_missing(s3, monkeypatch, capsys):
    del s3
    for name in ("sd15", "sd21-depth"):
        with pytest.raises(SystemExit):
            run(monkeypatch, name, "--dry-run")
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: 's3://BUCKET/")


def test_the_papers_settings_are_kept():
    rates = {"sd21-512": 1e-5, "sd15": 1e-5, "sd15-reflow": 5e-5, "sd21-depth": 3e-5}
    for name, rate in rates.items():
        train = FINETUNE[name].train
        assert (train.learning_rate, train.weight_decay, train.decay, train.global_batch_size) == (
            rate, 0.0, "constant", 128,
        )  # fmt: skip
        assert (train.ema.decay, train.ema.start_step, train.ema.power) == (0.999, 1000, 0.75)
    assert FINETUNE["sd15"].model.caption_dropout == FINETUNE["sd21-512"].model.caption_dropout == 0.02
    assert FINETUNE["sd21-512"].sampling.steps == 50 and FINETUNE["sd15-reflow"].sampling.steps == 10
    assert {name for name in NAMES if FINETUNE[name].model.method == "full"} == {
        "sd21-512", "sd15", "sd21-depth", "sdxl", "sdxl-community",
    }  # fmt: skip


def test_large_images_are_trained_and_sampled_nearer_to_noise():
    for name in ("sdxl", "sdxl-lora", "sdxl-community"):
        recipe = FINETUNE[name]
        assert (recipe.model.times.shift, recipe.sampling.shift) == (2.5, 3.0)
    community, train = FINETUNE["sdxl-community"].model, FINETUNE["sdxl-community"].train
    assert community.times.distribution == "logit_normal" and community.method == "full"
    assert (train.global_batch_size, train.learning_rate, train.warmup_steps / train.num_steps) == (256, 2e-5, 0.1)
    others = [FINETUNE[name] for name in NAMES if not name.startswith("sdxl")]
    assert {(recipe.model.times.shift, recipe.sampling.shift) for recipe in others} == {(1.0, 1.0)}


def test_what_the_quickstart_shows_is_among_what_it_trains_on(tmp_path: Path):
    config, images = WORKFLOW["quickstart"], str(tmp_path)
    manifest, training = make_dataset(replace(config.dataset, output=images))[0], config.finetune
    rows = RowReader(images, manifest, ("caption",)).read(np.arange(manifest.num_rows))
    captions = rows["caption"].to_pylist()  # latents are in the same order
    held = {captions[row] for row in training.plan([manifest], ()).sources[0].order.holdout()}
    assert len(held) == training.holdout_rows and set(config.prompts) <= set(captions) - held
    assert {f"{name}, openmoji style" for name in SHOWN_EMOJI} <= set(captions) - held
    assert training.latents == config.encode.output and REFLOW.captions == config.encode.output


def test_every_table_that_a_recipe_reads_has_a_recipe_that_makes_it():
    made = {config.output for config in (*ENCODE_LATENTS.values(), *ENCODE_DEPTH.values())}
    made |= {f"{config.output}/latents" for config in GENERATE.values() if config.emit == "pairs"}
    assert {FINETUNE[name].latents for name in NAMES} <= made


def test_an_estimate_counts_before_anything_exists(monkeypatch, capsys, tmp_path: Path):
    base = write_tiny(tmp_path, "sd15")
    flags = ["sd15-lora", "--architecture", str(base), "--resolution", "64", "--rows", "1000", "--gpu", "a10g"]
    monkeypatch.setattr(sys, "argv", ["estimate", *flags, "--train.num-workers", "4"])
    run_job("estimate", ESTIMATE, estimate.main)
    printed = capsys.readouterr().out
    assert "bf16, 64 px, micro-batch 4, 4 workers" in printed and "| **2** |" in printed and "| fits |" in printed
    assert "| 0 | refused: precision='bf16' with zero_stage=0" in printed
    config, _ = resolve("estimate", ESTIMATE, flags)
    found = estimated(config)
    # Twice four channels of 8x8 in half precision, and the box of the crop.
    assert found.row_bytes == 400 + 2 * 4 * 8 * 8 * 2 + 4 * 4
    assert found.checkpoint_bytes == 16 * found.trained and found.memory[2].peak < 7e9  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["sd15-lora", "sd21-depth", "sd15-reflow", "sd21-512"])
def test_a_recipe_builds_its_task_and_takes_a_step(name, tables):
    """All of a worker but Ray Train and DeepSpeed; SDXL's is tested in tests/model/test_sdxl.py."""
    config, _ = resolve("finetune", FINETUNE, [name, *tables[name], *TINY_RUN, "--train.precision", "fp32"])
    checked = finetune.check(config)
    task = checked.job().build_task("cpu")
    trained = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    numbers = pa.array([0, 1], pa.int64())
    rows = RowReader(config.latents, checked.manifests[0], checked.plan.columns).read(np.arange(2))
    rows = rows.append_column("epoch", numbers).append_column("row", numbers)
    before = [parameter.detach().clone() for parameter in trained]
    losses = task.loss_fn(task.module, task.to_batch(rows))
    losses.mean().backward()
    optimizer.step()
    assert losses.isfinite().all()
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


@slow("a minute: dry run, task and step stay, and the rails are run by test_finetune.py")
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ["sd21-512-lora", "sd15", "sdxl-lora"])
def test_a_recipe_runs_to_its_exported_model(name, tables, monkeypatch):
    """Ray Train, DeepSpeed with ZeRO 2 in bf16, checkpoints, export."""
    from d2f_core.model.artifact import load_model
    from d2f_core.train import checkpoint

    config, _ = resolve("finetune", FINETUNE, [name, *tables[name], *TINY_RUN])
    result = finetune.main(config)
    assert result.step == 2
    found = checkpoint.list_checkpoints(config.output)[-1]
    assert {file.kind for file in found.manifest.files} == set(KINDS)
    model = load_model(result.model)
    assert model.sampling.steps == config.sampling.steps
    assert model.base.content_hash == resolve_base(config.model.base).content_hash


def test_work_that_the_same_command_makes_up_ends_with_a_code_of_its_own(monkeypatch, capsys):
    def main(config):
        raise UnfinishedError("trained to step 8, but the evaluation of step 4 failed")

    monkeypatch.setattr("sys.argv", ["finetune", next(iter(FINETUNE))])
    with pytest.raises(SystemExit) as ended:
        run_job("finetune", FINETUNE, main)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "unfinished: trained to step 8, but the evaluation of step 4 failed\n"
