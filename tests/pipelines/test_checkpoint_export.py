"""A model made of any checkpoint, by files alone, is the one that the network would be saved as."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from d2f_core.data.manifest import read_manifest, write_manifest
from d2f_core.model import artifact_writer
from d2f_core.model.artifact import ArtifactError, load_model, load_weights, read_description, save_artifact
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig
from d2f_core.model.denoiser import as_denoiser
from d2f_core.model.latent_task import build_network, empty_network
from d2f_core.train.checkpoint import CheckpointError, list_checkpoints, read_tensors
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.retention import write_evaluation
from d2f_core.train.retention_rules import Retention
from pipelines import checkpoint_export
from pipelines.checkpoint_export import export_checkpoint
from pipelines.cli import from_yaml, resolve, to_yaml
from pipelines.configs import FinetuneConfig
from pipelines.export import RECIPES, check, main
from pipelines.export_config import CheckpointExportConfig
from tests.flow.tiny_base import write_tiny_base
from tests.latent_tables import write_latents
from tests.model.artifacts import STATES, TIMESTEP

WORKERS = 3
KEEP_ALL = Retention(keep_last=10**6)
MODELS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora with trained ends": {"lora": LoraConfig(preset="base")},
    "depth, full": {"method": "full", "task": "image_to_depth"},
    "depth, lora": {"lora": LoraConfig(rank=2), "task": "image_to_depth"},
}
MB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def latents(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("latents"))
    write_latents(uri, autoencoder_fingerprint(resolve_base(base)), rows=8, rows_per_file=8, captions=8)
    return uri


def configured(base: str, latents: str, output: Path, decay: float = 0.9, **model: Any) -> FinetuneConfig:
    train = TrainConfig(num_workers=WORKERS, global_batch_size=6, micro_batch_size=2, ema=EmaConfig(decay=decay))
    return FinetuneConfig(
        model=ModelConfig(base=base, **model), latents=latents, output=str(output), holdout_rows=2, train=train
    )


def write_run(
    config: FinetuneConfig,
    *steps: int,
    kinds: tuple[str, ...] = ("weights", "ema"),
    value: Callable[[torch.Size], torch.Tensor] = torch.randn,
    workers: int = WORKERS,
) -> None:
    """A run's config.yaml and checkpoints of several workers, each with a share of each kind."""
    base, manifest = resolve_base(config.model.base), read_manifest(config.latents)
    trained = [(name, p.shape) for name, p in empty_network(base, config.model).named_parameters() if p.requires_grad]
    owned: list[list[int]] = [[] for _ in range(workers)]
    for index in sorted(range(len(trained)), key=lambda index: -trained[index][1].numel()):
        min(owned, key=lambda own: sum(trained[i][1].numel() for i in own)).append(index)
    (Path(config.output) / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (Path(config.output) / "config.yaml").write_text(to_yaml(config))
    writers = [CheckpointWriter(config.output, "a", rank, workers, KEEP_ALL) for rank in range(workers)]
    for step in steps:
        torch.manual_seed(step)
        for writer in writers:
            share = [trained[index] for index in owned[writer.rank]]
            tensors = {kind: {name: 0.05 * value(shape) for name, shape in share} for kind in kinds}
            identity = config.identity(base.content_hash, [manifest])
            writer.save(step, samples=6 * step, identity=identity, tensors=tensors, state={})
        for writer in writers[::-1]:
            writer.wait()


@pytest.fixture(scope="module")
def run(base: str, latents: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    config = configured(base, latents, tmp_path_factory.mktemp("run"), lora=LoraConfig(rank=2))
    write_run(config, 2, 4, 6)
    return config


def by_the_network(config: FinetuneConfig, kind: str, target: Path) -> nn.Module:
    """The network with a checkpoint's weights, as it is after a training, saved by its own library."""
    network = build_network(resolve_base(config.model.base), config.model, 0)
    load_weights(network, read_tensors(list_checkpoints(config.output)[-1], kind))
    network.save_pretrained(target, safe_serialization=True)  # pyright: ignore
    return network


def files(directory: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "README.md"}
    if "config.json" in found:
        config = {name: value for name, value in json.loads(found["config.json"]).items() if name != "_name_or_path"}
        found["config.json"] = json.dumps(config).encode()
    return found


@torch.no_grad()
def output(network: nn.Module, channels: int) -> torch.Tensor:
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    joined = x[:, 4:] if channels > 4 else None
    return as_denoiser(network)(x[:, :4], TIMESTEP, text_states=STATES, joined_latents=joined)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_files_and_outputs_equal_those_of_the_network(base: str, latents: str, tmp_path: Path, model: dict[str, Any]):
    config = configured(base, latents, tmp_path / "run", **model)
    write_run(config, 3)
    export_checkpoint(CheckpointExportConfig(run=config.output, output=str(tmp_path / "model")))
    network = by_the_network(config, "ema", tmp_path / "network")
    assert files(tmp_path / "model" / artifact_writer.WEIGHTS[config.model.method]) == files(tmp_path / "network")
    loaded, channels = load_model(str(tmp_path / "model")), 8 if config.model.joins_latents else 4
    merged = network.merge_and_unload() if config.model.method == "lora" else network  # pyright: ignore
    assert torch.equal(output(loaded.network, channels), output(merged, channels))
    training = read_description(tmp_path / "model")["training"]
    last = list_checkpoints(config.output)[0]
    assert training == {
        "latents": latents, "latents_digest": read_manifest(latents).digest, "holdout_rows": 2, "step": 3,
        "checkpoint": last.uri, "identity": last.manifest.identity, "weights": "ema",
    }  # fmt: skip


def test_the_weights_themselves_can_be_asked_for(run: FinetuneConfig, tmp_path: Path):
    export_checkpoint(CheckpointExportConfig(run=run.output, output=str(tmp_path / "model"), weights="trained"))
    by_the_network(run, "weights", tmp_path / "network")
    assert files(tmp_path / "model/adapter") == files(tmp_path / "network")
    assert read_description(tmp_path / "model")["training"]["weights"] == "trained"


def test_large_weights_are_spread_over_files_as_by_diffusers(base: str, tmp_path: Path, monkeypatch):
    limit = 200_000
    monkeypatch.setattr(artifact_writer, "MAX_FILE_BYTES", limit)
    unet = UNet2DConditionModel.from_pretrained(f"{base}/unet")
    unet.save_pretrained(tmp_path / "diffusers", max_shard_size=limit)
    save_artifact(tmp_path / "model", unet, {"method": "full"}, reversed(unet.state_dict().items()))
    assert files(tmp_path / "model/unet") == files(tmp_path / "diffusers")
    assert len(files(tmp_path / "diffusers")) > 4
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "model/unet").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"new": torch.zeros(1)}, "'new' is of torch.float32 .* the network has none"),
        (lambda state: state | {"conv_in.bias": torch.zeros(3)}, r"'conv_in.bias' is of torch.float32 and \[3\]"),
        (lambda state: {name: value.half() for name, value in state.items()}, "is of torch.float16"),
        (lambda state: dict(list(state.items())[1:]), "1 tensors of the network are missing, such as 'conv_in.weight'"),
    ],
)
def test_weights_of_another_network_are_refused(base: str, tmp_path: Path, change: Callable, message: str):
    unet = UNet2DConditionModel.from_pretrained(f"{base}/unet")
    with pytest.raises(ArtifactError, match=message):
        save_artifact(tmp_path, unet, {"method": "full"}, change(unet.state_dict()).items())


def test_a_damaged_file_is_refused_with_its_name_and_the_old_model_stays(run: FinetuneConfig, tmp_path: Path):
    shutil.copytree(run.output, tmp_path / "run")
    wanted = CheckpointExportConfig(run=str(tmp_path / "run"), output=str(tmp_path / "model"), step=4)
    export_checkpoint(wanted)
    before = files(tmp_path / "model/adapter")
    shard = tmp_path / "run/checkpoints/step-00000004.a/ema-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"step-00000004\.a/ema-1\.safetensors has sha256 .* was damaged"):
        export_checkpoint(wanted)
    assert files(tmp_path / "model/adapter") == before and load_model(str(tmp_path / "model"))
    export_checkpoint(dataclasses.replace(wanted, step=2))
    assert read_description(tmp_path / "model")["training"]["step"] == 2


def exported_step(run: FinetuneConfig, step: Any, target: Path) -> int:
    export_checkpoint(CheckpointExportConfig(run=run.output, step=step, output=str(target)))
    return read_description(target)["training"]["step"]


def test_the_checkpoint_is_named_by_step_newest_or_best(run: FinetuneConfig, tmp_path: Path):
    shutil.copytree(run.output, tmp_path / "run")
    run = dataclasses.replace(run, output=str(tmp_path / "run"))
    assert [exported_step(run, step, tmp_path / "model") for step in (4, "newest")] == [4, 6]
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 3\. There are those of step 2, 4, 6"):
        exported_step(run, 3, tmp_path / "model")
    with pytest.raises(CheckpointError, match="none of the checkpoints of step 2, 4, 6 was evaluated"):
        exported_step(run, "best", tmp_path / "model")
    for checkpoint, loss in zip(list_checkpoints(run.output), (0.3, 0.2, float("nan")), strict=True):
        write_evaluation(checkpoint.uri, {"validation_flow_loss": loss})
    assert exported_step(run, "best", tmp_path / "model") == 4
    highest = dataclasses.replace(run, train=dataclasses.replace(run.train, keep_best_lower_is_better=False))
    (Path(run.output) / "config.yaml").write_text(to_yaml(highest))
    assert exported_step(highest, "best", tmp_path / "model") == 2


def test_what_does_not_belong_together_is_refused(base: str, latents: str, run: FinetuneConfig, tmp_path: Path):
    shutil.copytree(run.output, tmp_path / "run")
    wanted = CheckpointExportConfig(run=str(tmp_path / "run"), output=str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"identity [0-9a-f]{12}; .*\(--base, when the base moved"):
        check(dataclasses.replace(wanted, base=str(write_tiny_base(tmp_path / "other", seed=1))))
    moved = shutil.copytree(base, tmp_path / "moved")
    main(dataclasses.replace(wanted, base=str(moved)))
    assert read_description(tmp_path / "model")["base"]["uri"] == str(moved)
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml' does not exist\. Give --run the output of a finetuning"):
        check(wanted)
    plain = configured(base, latents, tmp_path / "plain", decay=0, lora=LoraConfig(rank=2))
    write_run(plain, 1, kinds=("weights",))
    wanted = dataclasses.replace(wanted, run=plain.output)
    with pytest.raises(CheckpointError, match=r"holds no weights='ema'\. Use --weights trained"):
        check(dataclasses.replace(wanted, weights="ema"))
    main(wanted)
    assert read_description(tmp_path / "model")["training"]["weights"] == "trained"


def test_a_run_of_a_table_that_has_grown_is_exported_with_the_version_that_it_began_with(base: str, tmp_path: Path):
    latents = str(tmp_path / "latents")
    write_latents(latents, autoencoder_fingerprint(resolve_base(base)), rows=8, rows_per_file=4, captions=8)
    config = configured(base, latents, tmp_path / "run", lora=LoraConfig(rank=2))
    write_run(config, 2)
    first = read_manifest(latents)
    write_manifest(latents, dataclasses.replace(first, files=first.files[:1]), 2)
    assert read_manifest(latents).digest != first.digest
    export_checkpoint(CheckpointExportConfig(run=config.output, output=str(tmp_path / "model")))
    assert read_description(tmp_path / "model")["training"]["latents_digest"] == first.digest


def test_a_checkpoint_that_the_training_deletes_meanwhile_is_not_damaged(run, tmp_path: Path, monkeypatch):
    shutil.copytree(run.output, tmp_path / "run")

    def slowly(*arguments: Any) -> nn.Module:
        shutil.rmtree(tmp_path / "run/checkpoints/step-00000004.a")
        return empty_network(*arguments)

    monkeypatch.setattr(checkpoint_export, "empty_network", slowly)
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        export_checkpoint(CheckpointExportConfig(run=str(tmp_path / "run"), step=4, output=str(tmp_path / "model")))


def test_the_command_takes_flags_and_a_file(tmp_path: Path):
    flags = ["checkpoint", "--run", "s3://d2f/run", "--step", "12000", "--weights", "trained", "--output", "/m"]
    config, _ = resolve("export", RECIPES, flags)
    assert config == CheckpointExportConfig(run="s3://d2f/run", step=12000, weights="trained", output="/m")
    for step in (12000, "best"):
        again = dataclasses.replace(config, step=step)
        assert from_yaml(CheckpointExportConfig, to_yaml(again), source="file") == again
    for run in ("", "/r"):
        with pytest.raises(ValueError, match=r"is empty\. Give --"):
            check(CheckpointExportConfig(run=run, output=run and ""))
    with pytest.raises(ValueError, match=r"step=-1 must be at least 0"):
        CheckpointExportConfig(step=-1)


IN_A_PROCESS = """
import resource, sys
from pipelines.export_config import CheckpointExportConfig
from pipelines.export import main

def export(run):
    main(CheckpointExportConfig(run=run, output=run + "/model"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

first = export(sys.argv[1])
print(export(sys.argv[2]) - first, *({"ray", "deepspeed", "mlflow"} & sys.modules.keys()))
"""


def wide_base(small: str, path: Path) -> Mapping[str, Any]:
    """A base with a wide UNet of which only the config is there: an export reads nothing else of it."""
    shutil.copytree(small, path, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    config = json.loads((path / "unet/config.json").read_text()) | {"block_out_channels": [256, 256]}
    (path / "unet/config.json").write_text(json.dumps(config))
    return {"base": str(path), "method": "full", "from_scratch": True}


def test_memory_grows_by_less_than_a_file_and_neither_ray_nor_deepspeed_is_imported(
    base: str, latents: str, run: FinetuneConfig, tmp_path: Path
):
    wide = configured(latents=latents, output=tmp_path / "run", **wide_base(base, tmp_path / "base"))
    write_run(wide, 1, kinds=("ema",), value=torch.ones, workers=4)
    sizes = [file.size for file in list_checkpoints(wide.output)[0].manifest.files]
    assert len(sizes) == 4 and sum(sizes) > 80 * MB
    answer = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, run.output, wide.output], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(answer[0]) < max(sizes) < sum(sizes) / 3, f"files of {sizes} bytes"
    assert answer[1:] == []
    assert (Path(wide.output) / "model/unet/diffusion_pytorch_model.safetensors").stat().st_size > 80 * MB
