"""A check runs on the cluster's head, which may have little memory: it builds no network and loads no weights."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from d2f_core.data.sources.config import ImageSource
from d2f_core.evaluation.config import GateConfig
from d2f_core.flow.depth.config import PredictDepthConfig
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.flow.evaluate.config import EvaluateConfig, MeasureConfig, ScoreConfig
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate
from d2f_core.flow.serve.config import ServeConfig
from d2f_core.model.artifact import describe, load_model, save_artifact
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.denoiser import ConditionError
from d2f_core.model.latent_task import build_network
from d2f_core.model.lora import AdapterError
from d2f_core.storage import upload_tree
from infra.local.stack import StackEnv
from pipelines import (
    encode_latents,
    evaluate,
    finetune,
    finetune_job,
    generate,
    predict_depth,
    reflow,
    serve,
    train_autoencoder,
)
from pipelines.configs import FinetuneConfig, TrainAutoencoderConfig
from pipelines.workflow_config import ReflowConfig
from tests.allocated import Allocated
from tests.flow.tiny_base import write_tiny_base
from tests.flow.tiny_vision import write_tiny_clip, write_tiny_vit
from tests.got_from_s3 import bytes_got
from tests.image_tables import write_images
from tests.latent_tables import write_latents
from tests.model.artifacts import trained

FLOOR = 16_000
"""Bytes of a storage that is counted: more than a noise schedule, less than a weight of the tiny UNet's attention."""
GB = 10**9
UNET_NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, models of both tasks on it, two vision models, tables and prompts."""
    place = tmp_path_factory.mktemp("head")
    base = write_tiny_base(place / "base")
    trained(base, place / "lora", LoraConfig(rank=2), steps=2, solver="euler")
    trained(base, place / "full", steps=2, solver="euler")
    write_depth_model(base, place / "depth")
    write_tiny_vit(place / "vit")
    write_tiny_clip(place / "clip")
    write_images(str(place / "images"), 16)
    fingerprint = autoencoder_fingerprint(resolve_base(str(base)))
    write_latents(str(place / "latents"), fingerprint, rows=100, rows_per_file=100, captions=3)
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat"}))
    return place


def write_depth_model(base: Path, target: Path) -> None:
    resolved, config = resolve_base(str(base)), ModelConfig(base=str(base), task="image_to_depth", method="full")
    sampling = SamplingDefaults(steps=2, guidance=1.0)
    about = describe(resolved, objective="diff2flow", method="full", sampling=sampling, training={},
                     task="image_to_depth", joined_channels=4)  # fmt: skip
    save_artifact(target, build_network(resolved, config, 0), about)


def finetune_of(place: Path, **model: object) -> FinetuneConfig:
    settings = {"base": str(place / "base"), "lora": LoraConfig(rank=2), **model}
    return FinetuneConfig(
        model=ModelConfig(**settings), latents=str(place / "latents"), output=str(place / "run"), holdout_rows=2
    )


CHECKS: dict[str, Callable[[Path], object]] = {
    "finetune": lambda place: finetune.check(finetune_of(place)),
    "finetune fully": lambda place: finetune.check(finetune_of(place, method="full")),
    "finetune from scratch": lambda place: finetune.check(finetune_of(place, method="full", from_scratch=True)),
    "train_autoencoder": lambda place: train_autoencoder.check(
        TrainAutoencoderConfig(
            base=str(place / "base"), images=str(place / "images"), output=str(place / "vae"), holdout_rows=0
        )
    ),
    "encode_latents": lambda place: encode_latents.check(
        EncodeConfig(
            source=ImageSource(uri=str(place / "images")), base=str(place / "base"), output=str(place / "encoded"),
            resolution=16, text="states",
        )
    ),
    "generate": lambda place: generate.check(
        GenerateConfig(prompts=str(place / "prompts.jsonl"), model=str(place / "base"), output=str(place / "made"))
    ),
    "serve": lambda place: serve.check(ServeConfig(model=str(place / "lora"))),
    "predict_depth": lambda place: predict_depth.check(
        PredictDepthConfig(
            source=ImageSource(uri=str(place / "images")), model=str(place / "depth"), output=str(place / "maps")
        )
    ),
    "evaluate": lambda place: evaluate.check(
        EvaluateConfig(
            candidate=str(place / "lora"), champion=str(place / "full"), base=str(place / "base"),
            prompts=str(place / "prompts.jsonl"), reference=str(place / "images"), output=str(place / "evaluation"),
            evaluations=(2,), score=ScoreConfig(features=str(place / "vit"), clip=str(place / "clip")),
            measure=MeasureConfig(neighbours=2), gate=GateConfig(metric="frechet@2", must_not_regress=(), limits=()),
            experiment="",
        )
    ),
    "reflow": lambda place: reflow.check(
        ReflowConfig(
            output=str(place / "rounds"), teacher=str(place / "lora"), captions=str(place / "latents"),
            finetune=replace(finetune_of(place), latents="", output=""),
        )
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for job in (finetune_job, reflow):
        monkeypatch.setattr(job, "check_tracking", lambda: "")


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_allocates_no_weights(place: Path, name: str) -> None:
    with Allocated(FLOOR) as made:
        CHECKS[name](place)
    assert not made.large


@pytest.mark.parametrize("model", ["base", "lora", "full"])
def test_what_a_check_leaves_out_is_what_an_actor_loads(place: Path, model: str) -> None:
    with Allocated(FLOOR) as made:
        load_model(str(place / model))
    assert len(made.large) > 4


def test_a_dry_run_of_drawing_with_a_base_reads_headers_alone(
    place: Path, s3: StackEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    uri = "s3://d2f/test-head/drawn-with"
    upload_tree(place / "base", uri)
    config = GenerateConfig(prompts=str(place / "prompts.jsonl"), model=uri, output=str(tmp_path / "made"))
    with bytes_got() as got:
        job = check_generate(config)
    weights = {key: size for key, size in got.items() if key.endswith(".safetensors")}
    assert len(weights) == 2 and sum(weights.values()) < (place / "base/unet" / UNET_NAME).stat().st_size / 4
    here = check_generate(replace(config, model=str(place / "base")))
    assert job.plan.identity() == here.plan.identity() and job.latents == here.latents


def test_a_dry_run_reads_headers_from_s3_and_a_start_reads_the_rest_once(
    place: Path, s3: StackEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    uri, unet, vae = "s3://d2f/test-head/base", f"unet/{UNET_NAME}", f"vae/{UNET_NAME}"
    upload_tree(place / "base", uri)
    config, local = finetune_of(place, base=uri), finetune_of(place)
    with bytes_got() as got:
        checked = finetune.check(config)
    size = (place / "base" / unet).stat().st_size
    assert got[f"test-head/base/{unet}"] < size / 4 and f"test-head/base/{vae}" in got
    with bytes_got() as got:
        job = checked.job()
    assert got == {f"test-head/base/{unet}": size}
    there = finetune.check(local).job()
    assert job.tags["d2f.base_sha256"] == there.tags["d2f.base_sha256"]
    assert job.identity == config.identity(there.base.content_hash, there.manifests)
    with bytes_got() as got:
        assert finetune.check(config).identity == job.identity
    assert not got
    assert not (tmp_path / "cache/models").exists()


@pytest.mark.starts_processes
@pytest.mark.timeout(120)
def test_a_head_of_little_memory_checks_sdxl(tmp_path: Path) -> None:
    """The network has 5.1 GB in its files, and 10 GB as it is loaded."""
    command = [sys.executable, "-m", "tests.pipelines.sdxl_on_a_head", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    unet = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    assert unet.stat().st_size > 5 * GB and unet.stat().st_blocks * 512 < GB / 100
    assert {name: values["allocated"] for name, values in found.items()} == dict.fromkeys(found, 0)
    assert len(found) > 5 and max(values["peak"] for values in found.values()) < 1.5 * GB


@pytest.mark.parametrize(
    ("part", "change", "error", "message"),
    [
        ("unet", {"block_out_channels": [16, 24]}, BaseModelError, "unet/ does not hold what its config.json asks for"),
        (
            "unet",
            {"addition_embed_type": "text"},
            ConditionError,
            "addition_embed_type='text'",
        ),
    ],
)
def test_a_finetuning_of_a_base_that_cannot_be_trained_is_refused(
    place: Path, tmp_path: Path, part: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    base = write_tiny_base(tmp_path)
    file = base / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    from_scratch = {"method": "full", "from_scratch": error is ConditionError}
    with pytest.raises(error, match=message):
        finetune.check(finetune_of(place, base=str(base), **from_scratch))


def test_lora_targets_are_looked_for_in_the_network_without_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_base(tmp_path)
    file = base / "unet/config.json"
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **blocks}))
    monkeypatch.setattr("d2f_core.model.latent_task.check_unet", lambda _: None)
    with pytest.raises(AdapterError, match="no layer of the network fits preset='attention'"):
        finetune.check(finetune_of(place, base=str(base), lora=LoraConfig(preset="attention")))
