"""Reflow with real servers: a model draws pairs, learns their straight lines, and is registered with its teacher."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2f_core.batch.output import OutputError
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import read_manifest
from d2f_core.data.schema import SchemaError
from d2f_core.data.table_reader import RowReader
from d2f_core.evaluation.config import GateConfig
from d2f_core.flow.evaluate.config import EvaluateConfig, MeasureConfig, ScoreConfig
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate
from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.model.artifact import load_model
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.latent_task import build_network
from d2f_core.model.text_to_image import TextToImage
from d2f_core.storage import read_bytes, write_bytes
from d2f_core.tracking import get_alias, resolve_model
from d2f_core.train.config import TrainConfig
from pipelines import finetune, finetune_task
from pipelines.configs import FinetuneConfig
from pipelines.reflow import Teacher, check, drawing_of, main
from pipelines.workflow_config import ReflowConfig
from tests.flow.here import here
from tests.flow.tiny_vision import write_tiny_vit
from tests.image_tables import write_images
from tests.latent_tables import write_latents
from tests.slow import slow
from tests.train_here import trained_here

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]
HOME = "s3://d2f/test-reflow"


@pytest.fixture(scope="module")
def config(base: str, tmp_path_factory: pytest.TempPathFactory) -> ReflowConfig:
    vit = write_tiny_vit(tmp_path_factory.mktemp("nets") / "vit")
    write_latents(f"{HOME}/captions", autoencoder_fingerprint(resolve_base(base)), rows=5, rows_per_file=5, captions=3)
    write_bytes(f"{HOME}/prompts.jsonl", b"\n".join(b'{"prompt": "shape %d"}' % number for number in range(12)))
    return ReflowConfig(
        output=f"{HOME}/workflow",
        teacher=base,
        captions=f"{HOME}/captions",
        num_pairs=12,
        rounds=1,
        generate=GenerateConfig(steps=(2,), guidance=3.0, solver="ddim", num_actors=1, chunk_size=8),
        finetune=FinetuneConfig(
            model=ModelConfig(base=base, lora=LoraConfig(rank=2)),
            latents="",
            output="",
            holdout_rows=2,
            sampling=SamplingDefaults(steps=2, guidance=1.0),
            train=TrainConfig(
                num_steps=2, global_batch_size=2, micro_batch_size=2, threads_per_worker=1, zero_stage=0,
                evaluate_every=0, lanes=1, window_rows=4,
            ),
            experiment="reflow tests",
        ),
        register=RegisterConfig(name="reflow-test"),
        evaluate=EvaluateConfig(
            base=base, prompts=f"{HOME}/prompts.jsonl", reference=write_images(f"{HOME}/images", 12),
            evaluations=(1, 2), score=ScoreConfig(features=str(vit), dimensions=4, num_actors=1),
            measure=MeasureConfig(replicates=20, neighbours=1), gate=GateConfig(metric="frechet@2"), promote=False,
            straightness_prompts=2, straightness_steps=2, shown_prompts=1, experiment="",
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def versions(config: ReflowConfig) -> list[dict[str, str]]:
    with here(), trained_here():
        return main(config)


@pytest.fixture(scope="module")
def version(versions: list[dict[str, str]]) -> dict[str, str]:
    return versions[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": f"{HOME}/nowhere.jsonl"}, "nowhere.jsonl"),
        ({"reference": f"{HOME}/captions"}, "is a table of latents. Give real images"),
    ],
)
def test_what_the_last_stage_lacks_is_missed_before_the_first(
    config: ReflowConfig, changes: dict[str, str], message: str
) -> None:
    check(config)
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **changes)))


def test_pairs_hold_the_noise_that_each_latent_came_from(config: ReflowConfig, version: dict[str, str]) -> None:
    uri = f"{HOME}/workflow/round-1/pairs/latents"
    manifest = read_manifest(uri)
    assert manifest.kind == "latents" and manifest.num_rows == 12
    arrays = table_to_arrays(
        RowReader(uri, manifest, (*finetune_task.COLUMNS, "noise", "sample_id")).read(np.arange(12))
    )
    model = load_model(config.teacher)
    request = fill_request(
        model,
        prompt=str(arrays["caption"][0]),
        sample_id=str(arrays["sample_id"][0]),
        seed=1,
        steps=2,
        guidance=3.0,
        solver="ddim",
    )
    (made,) = ImageSampler(model).sample([request])
    assert made.latent is not None
    np.testing.assert_allclose(arrays["latent_mean"][0], made.latent, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(arrays["noise"][0], made.noise, atol=2e-3, rtol=1e-3)
    task = TextToImage(model.base, config.finetune.model, seed=0, dtype=torch.float32, device="cpu")
    batch = task.to_batch({**arrays, "row": np.arange(12), "epoch": np.zeros(12, int)})
    assert torch.equal(batch["noise"], torch.from_numpy(arrays["noise"].astype(np.float32)))


def test_the_version_names_its_teacher_and_its_pairs(config: ReflowConfig, version: dict[str, str]) -> None:
    description = json.loads(read_bytes(f"{HOME}/workflow/round-1/run/model/diff2flow.json"))
    assert description["training"]["teacher"] == config.teacher
    assert description["training"]["latents"] == f"{HOME}/workflow/round-1/pairs/latents"
    assert version["name"] == "reflow-test"


def test_the_version_is_measured_beside_the_base_and_no_alias_moves(
    config: ReflowConfig, version: dict[str, str]
) -> None:
    found = json.loads(read_bytes(f"{HOME}/workflow/round-1/evaluation/metrics.json"))
    assert [(model["role"], model["uri"]) for model in found["models"]] == [
        ("candidate", version["uri"]),
        ("base", config.teacher),
    ]
    assert set(found["metrics"]["frechet"]["values"]["candidate"]) == {"1", "2"}
    assert all(0 < model["straightness"]["value"] < 10 for model in found["models"])
    assert get_alias("reflow-test", "champion") is None


def test_a_finished_workflow_does_nothing(config: ReflowConfig, versions: list[dict[str, str]]) -> None:
    assert main(config) == versions


def test_a_second_round_is_drawn_by_the_first_ones_version_as_that_carries_it(
    config: ReflowConfig, version: dict[str, str]
) -> None:
    teacher = Teacher(uri=version["uri"], digest=version["digest"], start=version["uri"])
    first = json.loads(read_bytes(f"{HOME}/workflow/round-1/pairs/plan.json"))
    second = check_generate(drawing_of(config, 2, teacher)).plan
    assert (first["model_uri"], first["guidance"], first["solver"]) == (config.teacher, 3.0, "ddim")
    assert (second.model_uri, second.guidance, second.solver) == (version["uri"], 1.0, "euler")
    assert second.prompts_digest != first["prompts_digest"], "from noises of its own"


@slow("two minutes, on the cluster: one round, trained in this process, and how the second is drawn, stay")
def test_two_rounds_one_after_the_other_on_the_cluster(config: ReflowConfig) -> None:
    output = f"{HOME}/two-rounds"
    first, second = main(
        dataclasses.replace(config, rounds=2, output=output, register=RegisterConfig(name="reflow-two"))
    )
    assert (first["version"], second["version"]) == ("1", "2")
    plan = json.loads(read_bytes(f"{output}/round-2/pairs/plan.json"))
    assert (plan["model_uri"], plan["guidance"], plan["solver"]) == (first["uri"], 1.0, "euler")
    found = json.loads(read_bytes(f"{output}/round-2/evaluation/metrics.json"))
    assert [model["role"] for model in found["models"]] == ["candidate", "champion", "base"]


def test_other_pairs_at_the_same_output_are_refused_and_nothing_is_lost(
    config: ReflowConfig, versions: list[dict[str, str]]
) -> None:
    with pytest.raises(OutputError, match=r"another job .*num_prompts was 12, now 13"):
        main(dataclasses.replace(config, num_pairs=13))
    assert main(config) == versions


def test_a_teacher_that_the_training_cannot_begin_with_is_refused_at_the_door(
    config: ReflowConfig, version: dict[str, str], tmp_path: Path
) -> None:
    student, own = dataclasses.replace(config, teacher=version["uri"]), config.finetune.model
    assert check(student).start == version["uri"]
    for change, message in (({"method": "full"}, "by method='lora'"), ({"lora": LoraConfig(rank=3)}, "other shapes")):
        training = dataclasses.replace(config.finetune, model=dataclasses.replace(own, **change))
        with pytest.raises(ValueError, match=message):
            check(dataclasses.replace(student, finetune=training))
    twin = shutil.copytree(resolve_base(config.teacher).path, tmp_path / "twin")
    assert check(dataclasses.replace(config, teacher=str(twin))).start == "", "the base, by another name"
    with (twin / "unet/config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"is a base with the hash .* Train the base that draws the pairs"):
        check(dataclasses.replace(config, teacher=str(twin)))


def test_a_further_round_starts_from_the_version(config: ReflowConfig, version: dict[str, str], tmp_path: Path) -> None:
    start, base = resolve_model(version["uri"]), resolve_base(config.teacher)
    network = build_network(base, dataclasses.replace(config.finetune.model, start=start), seed=5)
    again = tmp_path / "again"
    cast(Any, network).save_pretrained(again)
    saved, trained = (load_file(place / "adapter_model.safetensors") for place in (again, Path(start, "adapter")))
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in trained)
    assert any(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name), "it was trained"
    with pytest.raises(ValueError, match="Use the LoRA settings that it was trained with"):
        build_network(base, dataclasses.replace(config.finetune.model, start=start, lora=LoraConfig(rank=3)), seed=5)
    with pytest.raises(ValueError, match="was trained by method='lora', not 'full'"):
        build_network(base, dataclasses.replace(config.finetune.model, start=start, method="full"), seed=5)


def test_pairs_of_another_base_are_refused(config: ReflowConfig, version: dict[str, str]) -> None:
    uri = f"{HOME}/workflow/round-1/pairs/latents"
    training = dataclasses.replace(config.finetune, latents=uri, output=f"{HOME}/other")
    checked = finetune.check(training)
    vars(checked.base)["content_hash"] = "other"
    with pytest.raises(SchemaError, match="pairs were made by a model on the base"):
        finetune_task.make_plan(training, checked.base, checked.manifests)
