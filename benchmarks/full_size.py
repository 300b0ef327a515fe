"""The whole path on a full-size SD 1.5 with random weights: two optimizer steps of LoRA `small` on CPU.

    python -m benchmarks.full_size --results docs/results/full_size.json

Writes a base model of SD 1.5's configs with random weights (5 GB of disk; the tokenizer alone is a small one), a latent
table of 4x32x32 latents, and runs `pipelines.finetune` on a local stack: one Ray Train worker, DeepSpeed, a checkpoint,
the exported model. Reported are the seconds of each part and the worker's largest resident memory, beside what
`d2f_core.train.memory` says. Needs 14 GB of free memory.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from diffusers import DDIMScheduler

from d2f_core.flow.estimate.job import DTYPES, build_on_meta
from d2f_core.model import footprint
from d2f_core.model.architectures import KNOWN
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import PreviewConfig
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.memory import Memory, memory_per_worker
from infra.local.stack import Stack
from pipelines.cli import to_yaml
from pipelines.configs import FinetuneConfig
from pipelines.recipes import FINETUNE
from tests.latent_tables import write_latents
from tests.model.tiny_sdxl import END, write_tokenizer

NEEDED = 14 * 10**9
LATENTS = "s3://d2f/full-size/latents"
WORKER = "ray::RayTrainWorker"


@dataclass(frozen=True, kw_only=True)
class FullSizeConfig:
    results: Path | None = None
    steps: int = 2
    side: int = 32
    """Height and width of the latents."""
    zero_stage: int = 2


class WorkerMemory(threading.Thread):
    """Looks twice a second at the resident memory of the training's worker."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.at_start, self._ended = 0, 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
                if WORKER in " ".join(process.info["cmdline"] or [process.info["name"] or ""]):
                    resident = process.info["memory_info"].rss
                    self.at_start, self.peak = self.at_start or resident, max(self.peak, resident)

    def end(self) -> None:
        self._ended.set()
        self.join()


def write_base(path: Path) -> Path:
    """SD 1.5 with random weights in diffusers' layout."""
    architecture = KNOWN["sd15"]
    torch.manual_seed(0)
    architecture.build_unet().save_pretrained(path / "unet")
    architecture.build_vae().save_pretrained(path / "vae")
    (encoder,) = architecture.build_text_encoders()
    encoder.save_pretrained(path / "text_encoder")  # type: ignore[operator]
    write_tokenizer(path / "tokenizer", END)
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(path / "scheduler")
    return path


def make_config(config: FullSizeConfig, base: Path) -> FinetuneConfig:
    recipe = FINETUNE["sd15-lora"]
    train = TrainConfig(
        num_steps=config.steps, global_batch_size=1, micro_batch_size=1, num_workers=1, precision="fp32",
        zero_stage=config.zero_stage, learning_rate=1e-5, ema=EmaConfig(decay=0.999), log_every=1,  # type: ignore[arg-type]
        checkpoint_every=config.steps, evaluate_every=0, max_failures=0, lanes=1,
    )  # fmt: skip
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, base=str(base)), latents=LATENTS,
        output="s3://d2f/full-size/run", holdout_rows=0, preview=PreviewConfig(), train=train,
    )  # fmt: skip


def predict(job: FinetuneConfig, side: int) -> tuple[Memory, footprint.PassCount]:
    network, train = build_on_meta(KNOWN["sd15"], job.model), job.train
    counted = footprint.count_pass(network, batch=train.micro_batch_size, side=side, dtype=DTYPES[train.precision])
    with torch.device("meta"):
        encoders = KNOWN["sd15"].build_text_encoders()
    text = 4 * sum(sum(footprint.sizes(encoder, trained=True)) for encoder in encoders)
    trained, frozen = (footprint.sizes(network, trained=which) for which in (True, False))
    return memory_per_worker(train, trained, frozen, activations=counted.peak_bytes, others=text), counted


def run(config: FullSizeConfig, directory: Path) -> dict[str, Any]:
    clock = [time.perf_counter()]
    base = write_base(directory / "base")
    job = make_config(config, base)
    memory, counted = predict(job, config.side)
    shape = (4, config.side, config.side)
    fingerprint = autoencoder_fingerprint(resolve_base(str(base)))
    write_latents(LATENTS, fingerprint, rows=8, rows_per_file=8, shape=shape, pixels=8 * config.side, captions=4)
    clock.append(time.perf_counter())
    watch = WorkerMemory()
    watch.start()
    file = directory / "full-size.yaml"
    file.write_text(to_yaml(job))
    subprocess.run([sys.executable, "-m", "pipelines.finetune", "--config", str(file)], check=True)
    watch.end()
    clock.append(time.perf_counter())
    import mlflow

    (done,) = mlflow.search_runs(experiment_names=[job.experiment], output_format="list")
    metrics: dict[str, float] = done.data.metrics  # type: ignore[union-attr]
    # On a CPU the copy of a checkpoint lies in the same memory, with one kind of its tensors as a file.
    trained, owned = memory.copies // 4, memory.averages // 4
    saving = memory.state + memory.saving + (16 + 4) * owned + (4 * owned if config.zero_stage == 3 else 0)
    return {
        "config": {"steps": config.steps, "latents": list(shape), "precision": "fp32", "zero_stage": config.zero_stage},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "trained_parameters": trained,
        "seconds": {"write base and table": clock[1] - clock[0], "finetune command": clock[2] - clock[1]},
        "metrics": metrics,
        "worker_peak_bytes": watch.peak,
        "worker_bytes_first_seen": watch.at_start,
        "predicted": dataclasses.asdict(memory),
        "predicted_bytes_passing": memory.peak,
        "predicted_bytes_saving": saving,
        "flops_per_step": counted.flops,
    }


def main() -> None:
    config = tyro.cli(FullSizeConfig)
    if (free := psutil.virtual_memory().available) < NEEDED:
        raise SystemExit(
            f"{free / 1e9:.1f} GB of memory are free, {NEEDED / 1e9:.0f} GB are needed. End other programs."
        )
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, tied=True)
        os.environ.update(stack.up().variables)
        try:
            found = run(config, Path(directory))
        finally:
            stack.down()
    text = json.dumps(found, indent=1)
    print(text)
    if config.results:
        config.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
