"""From a folder of photos and a single-file checkpoint to a registered, measured flow model, on real servers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import ray

from d2f_core.data.manifest import read_manifest
from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.flow.evaluate.config import EvaluateConfig, MeasureConfig, ScoreConfig
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.import_images.config import ImportImagesConfig
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.importing.config import ImportCheckpointConfig
from d2f_core.storage import read_bytes, upload_tree
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines import photos
from pipelines.cli import from_yaml, to_yaml
from pipelines.photos_config import PhotosConfig
from pipelines.recipes import FINETUNE
from pipelines.workflow_recipes import PHOTOS
from tests.flow.here import here
from tests.flow.tiny_vision import write_tiny_vit
from tests.import_images.photos import write_photos
from tests.model.single_file.files import write_file
from tests.model.tiny_sd import write_tiny
from tests.train_here import trained_here

HOME = "s3://d2f/test-photos"


def tiny(config: PhotosConfig, vit: str) -> PhotosConfig:
    """The recipe as it is, but for sizes and devices."""
    train = TrainConfig(
        num_steps=4, global_batch_size=4, micro_batch_size=2, zero_stage=0, learning_rate=1e-3, threads_per_worker=1,
        ema=EmaConfig(decay=0.9), checkpoint_every=2, evaluate_every=4, evaluate_on="workers",
    )  # fmt: skip
    score = ScoreConfig(features=vit, num_actors=1, batch_size=8)
    return dataclasses.replace(
        config,
        images=ImportImagesConfig(min_side=32, held_out_share=0.25, rows_per_part=32, max_quarantined_share=0.02),
        encode=EncodeConfig(num_actors=1, rows_per_part=32),
        finetune=dataclasses.replace(
            config.finetune,
            model=ModelConfig(base="", lora=LoraConfig(rank=2)),
            train=train, sampling=SamplingDefaults(steps=2, guidance=1.0), experiment="test-photos",
        ),
        evaluate=EvaluateConfig(
            evaluations=(2, 4), score=score, measure=MeasureConfig(replicates=20, pairwise_rows=30),
            straightness_prompts=0, experiment="test-photos",
        ),
        generate=GenerateConfig(steps=(2,), num_actors=1, experiment="test-photos"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PhotosConfig:
    """200 photos of mixed sizes and orientations in a bucket, and a checkpoint as one file beside them."""
    home = tmp_path_factory.mktemp("photos")
    base = write_file(write_tiny(home / "base", "sd15"), home / "file" / "mine.safetensors", scheduler=False)
    upload_tree(base.parent, f"{HOME}/checkpoint")
    upload_tree(write_photos(home / "in", 200), f"{HOME}/photos")
    given = dataclasses.replace(
        PHOTOS["photos"], name="test-photos", base=f"{HOME}/checkpoint/mine.safetensors",
        source=ImageSource(uri=f"{HOME}/photos"), resolution=64, place=f"{HOME}/out",
    )  # fmt: skip
    return tiny(given, str(write_tiny_vit(home / "vit")))


@pytest.mark.timeout(600)
def test_photos_become_a_registered_flow_model_that_was_measured_on_those_held_out(config: PhotosConfig) -> None:
    photos.check(config)
    ray.init(ignore_reinit_error=True)
    with trained_here(), here():
        version = photos.main(config)
        again = photos.main(config)
    assert version == again and version["name"] == "test-photos"
    summary = json.loads(read_bytes(f"{config.output}/summary.json"))
    assert [(stage["name"], stage["skipped"]) for stage in summary["stages"]] == [(name, True) for name in photos.TOLD]
    assert json.loads(read_bytes(f"{config.output}/base/import.json"))["settings"]["source"] == config.base
    assert f"base: {config.output}/base" in read_bytes(f"{config.output}/run/config.yaml").decode()
    train, test = (read_manifest(config.images_of(side)) for side in ("train", "test"))
    assert train.num_rows + test.num_rows == 200 and test.num_rows >= 24
    assert read_manifest(f"{config.output}/latents").num_rows == train.num_rows
    results = json.loads(read_bytes(f"{config.output}/evaluation/metrics.json"))
    assert results["prompts"]["count"] == test.num_rows
    drawn = read_bytes(f"{config.output}/prompts.jsonl").decode().splitlines()
    assert len(drawn) == 6 and all("emoji" not in line and " and " in line for line in drawn)


def test_a_later_stages_setting_is_no_other_import(config: PhotosConfig) -> None:
    photos.check(dataclasses.replace(config, evaluated=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 60}, r"resolution=60 is not a multiple of the autoencoder's 8 pixels"),
        ({"resolution": 0}, r"resolution=0 must be at least 1"),
        (
            {"images": ImportImagesConfig(num_readers=3, near_distance=2)},
            r"another import: .*near_distance was 4, now 2",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_the_prompt(
    config: PhotosConfig, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        photos.check(dataclasses.replace(config, **changes))


def test_new_photos_at_the_same_place_are_refused_and_not_passed_over(config: PhotosConfig, tmp_path: Path) -> None:
    upload_tree(write_photos(tmp_path / "more", 1, first=777), f"{HOME}/photos")
    with pytest.raises(ValueError, match=r"images of another import: source_digest was"):
        photos.check(config)
    shutil.rmtree(tmp_path / "more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, r"name is empty\. Give --name NAME"),
        ({"base": ""}, r"base is empty\. Give --base URI"),
        ({"source": ImageSource()}, r"source\.uri is empty"),
        ({"encode": EncodeConfig(buckets=("auto",), bucket_step=8)}, r"imports squares.* give --images\.crop; for its"),
        ({"encode": EncodeConfig(crop="top")}, r"encode\.crop='top': this workflow imports squares"),
        ({"encode": EncodeConfig(base="x")}, r"encode\.base='x' is filled in by this workflow"),
        ({"checkpoint": ImportCheckpointConfig(source="x")}, r"checkpoint\.source='x' is filled in"),
        ({"images": ImportImagesConfig(resolution=768)}, r"images\.resolution=768 is filled in"),
        ({"generate": GenerateConfig(prompts="mine")}, r"generate\.prompts='mine' is filled in"),
        ({"evaluate": EvaluateConfig(base="x")}, r"evaluate\.base='x' is filled in"),
        ({"sheet": ContactSheetConfig(output="x")}, r"sheet\.output='x' is filled in"),
        ({"shown": 0}, r"shown=0 must be at least 1"),
        ({"place": "s/below"}, r"place='s/below' puts the outputs, 's/below/n', inside the source 's'\. Give --place"),
    ],
)
def test_what_is_the_users_to_say_is_asked_for(changes: dict, message: str) -> None:
    given = dataclasses.replace(PHOTOS["photos"], name="n", base="b", source=ImageSource(uri="s"))
    given.check_complete()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(given, **changes).check_complete()


@pytest.mark.parametrize(
    ("base", "checkpoint", "imports"),
    [
        ("s3://models/sd15", ImportCheckpointConfig(), False),
        ("infra/models/emoji-sd", ImportCheckpointConfig(), False),
        ("s3://models/mine.safetensors", ImportCheckpointConfig(), True),
        ("owner/name@main", ImportCheckpointConfig(), True),
        ("s3://models/sd15", ImportCheckpointConfig(lora=("a.safetensors",)), True),
        ("s3://models/sd15", ImportCheckpointConfig(vae="b"), True),
        ("s3://models/sd15", ImportCheckpointConfig(zero_snr=False), True),
    ],
)
def test_a_base_is_made_where_there_is_something_to_make(
    base: str, checkpoint: ImportCheckpointConfig, imports: bool
) -> None:
    given = dataclasses.replace(PHOTOS["photos"], name="n", base=base, checkpoint=checkpoint)
    assert given.imports_checkpoint == imports
    assert given.wired_checkpoint().source == base and given.wired_checkpoint().output.endswith("/n/base")


@pytest.mark.parametrize("name", PHOTOS)
def test_nothing_of_the_emojis_is_in_the_recipes(name: str) -> None:
    for config in (PHOTOS[name], *([FINETUNE[name]] if name in FINETUNE else ())):
        text = to_yaml(config)
        assert "emoji" not in text and "openmoji" not in text
        assert from_yaml(type(config), text, source="x") == config
