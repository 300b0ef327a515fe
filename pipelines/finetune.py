"""Train a latent model: `python -m pipelines.finetune emoji-lora --train.num-steps 200`.

The same command again resumes.
"""

import dataclasses
import functools
import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from d2f_core import storage
from d2f_core.data.latents import check_fingerprint, table_to_arrays
from d2f_core.data.manifest import Manifest, canonical_json, read_manifest
from d2f_core.data.order import SampleOrder
from d2f_core.data.stream import RowReader, StreamPlan
from d2f_core.model.artifact import DESCRIPTION, describe, load_weights, save_artifact
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.model.text_to_image import TextToImage, build_network, image_grid
from d2f_core.tracking import RunHandle, check_tracking, start_run
from d2f_core.train.checkpoint import CheckpointManifest, read_tensors
from d2f_core.train.launch import run_training
from d2f_core.train.task import Evaluation, Task
from pipelines.cli import run_job, to_yaml
from pipelines.configs import FinetuneConfig

logger = logging.getLogger(__name__)

COLUMNS = ("caption", "latent_mean", "latent_std")


def sample_order(config: FinetuneConfig, manifest: Manifest) -> SampleOrder:
    return SampleOrder(num_rows=manifest.num_rows, holdout_rows=config.holdout_rows, seed=config.train.seed)


def build_task(config: FinetuneConfig, device: str) -> Task:
    """What a worker trains; called once on each."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    task = TextToImage(
        resolve_base(config.model.base), config.model, seed=config.train.seed, dtype=dtype, device=device
    )
    manifest = read_manifest(config.latents)
    rows = sample_order(config, manifest).holdout()
    prompts = config.preview.prompts

    def evaluate(network: Any, rank: int, num_workers: int) -> Evaluation:
        # Equal shares: under ZeRO 3 every worker must call the network equally often.
        share = rows[: len(rows) // num_workers * num_workers][rank::num_workers]
        sums = {}
        if len(share):
            table = RowReader(config.latents, manifest, COLUMNS).read(share)
            sums["validation_flow_loss"] = task.validation_loss(network, {**table_to_arrays(table), "row": share})
        size = len(prompts) // num_workers
        mine = prompts[rank * size : (rank + 1) * size]
        return Evaluation(sums=sums, images=task.preview(network, config.preview, mine) if mine else ())

    return Task(
        module=task.module,
        to_batch=lambda table: task.to_batch(table_to_arrays(table)),
        loss_fn=task.loss,
        evaluate=evaluate,
        make_grid=functools.partial(image_grid, columns=config.preview.columns),
    )


def identity(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> str:
    """Hash of what must stay the same for a checkpoint to belong to this run."""
    return hashlib.sha256(
        canonical_json(
            {
                "model": {k: v for k, v in config.model.__dict__.items() if k not in ("base", "lora")},
                "lora": config.model.lora.__dict__,
                "base": base.content_hash,
                "latents": manifest.digest,
                "holdout_rows": config.holdout_rows,
                "seed": config.train.seed,
                "global_batch_size": config.train.global_batch_size,
            }
        )
    ).hexdigest()


def check(config: FinetuneConfig) -> tuple[BaseModel, Manifest]:
    """Refuse what cannot work, before anything is started."""
    storage.check_reachable(config.latents)
    storage.check_reachable(config.output, write=True)
    base, manifest = resolve_base(config.model.base), read_manifest(config.latents)
    check_fingerprint(manifest, autoencoder_fingerprint(base))
    sample_order(config, manifest)
    return base, manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    run: RunHandle
    step: int
    """Optimizer steps done."""
    checkpoint: str
    model: str
    """The trained model's directory."""
    description: dict[str, Any]
    """Its `diff2flow.json`."""


def export(config: FinetuneConfig, base: BaseModel, uri: str, last: CheckpointManifest) -> tuple[str, dict[str, Any]]:
    """Write `OUTPUT/model/` from a checkpoint (averaged weights if there are any); needs no GPU and no engine."""
    network = build_network(base, config.model, config.train.seed)
    load_weights(network, read_tensors(uri, last, "ema" if config.train.ema.decay else "weights"))
    training = {"latents": config.latents, "step": last.step, "checkpoint": uri, "identity": last.identity}
    description = describe(
        base, objective=config.model.objective, method=config.model.method, sampling=config.sampling, training=training
    )
    target = storage.join(config.output, "model")
    # A longer training replaces the model: without its description the half-replaced one is none.
    storage.remove_tree(storage.join(target, DESCRIPTION))
    with tempfile.TemporaryDirectory() as directory:
        save_artifact(Path(directory), network, description)
        storage.upload_tree(Path(directory), target, last=DESCRIPTION)
    return target, description


def main(config: FinetuneConfig) -> FinetuneResult:
    """Train to the end and export the model."""
    import ray

    base, manifest = check(config)
    check_tracking()
    ray.init(ignore_reinit_error=True)
    text = to_yaml(config)
    storage.write_bytes(storage.join(config.output, "config.yaml"), text.encode())
    run = start_run(
        experiment=config.experiment,
        run_key=config.output,
        name=config.name,
        config_yaml=text,
        params=dataclasses.asdict(config),
        tags={"d2f.base": base.uri, "d2f.base_sha256": base.content_hash, "d2f.latents_digest": manifest.digest},
    )
    logger.info("MLflow run: %s", run.url)
    uri, last = run_training(
        config=config.train,
        build_task=functools.partial(build_task, config),
        plan=StreamPlan(
            uri=config.latents,
            columns=COLUMNS,
            order=sample_order(config, manifest),
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            first_step=0,
            num_steps=config.train.num_steps,
        ),
        output=config.output,
        identity=identity(config, base, manifest),
        tracker=run,
    )
    model, description = export(config, base, uri, last)
    run.finish()
    logger.info("model: %s", model)
    return FinetuneResult(run=run, step=last.step, checkpoint=uri, model=model, description=description)


if __name__ == "__main__":
    from pipelines.recipes import FINETUNE

    run_job("finetune", FINETUNE, main, check)
