"""What the training rails cost per step, rung by rung, against a bare torch loop over ready-made batches.

    python -m benchmarks.loop_overhead --results docs/results/loop_overhead.json

| rung       | what it adds                                                                                      |
|------------|---------------------------------------------------------------------------------------------------|
| torch      | forward, backward, clipping, AdamW, moving average, on batches that are in memory before the clock |
| accelerate | the same steps by Hugging Face accelerate (`prepare`, `backward`, `clip_grad_norm_`)               |
| deepspeed  | the same steps by our engine (ZeRO stage as given)                                                 |
| ray        | the same inside a Ray Train worker                                                                 |
| data       | rows streamed from S3 by Ray Data, latents, noise and flow times drawn per sample, captions encoded |
| job        | metrics to MLflow and checkpoints to S3 every `--every` steps: all of `pipelines.finetune`          |

The rungs run one after another, again and again (`--rounds`); a ratio is that of medians within a round. `torch again`
is the control: what its ratio spreads is the finest difference that can be claimed. Every rung must end with the same
losses to 1e-6, or its ratio is void. The worker computes with one thread, so that on a machine with two cores the other
one is left to what runs beside the training, as a CPU is beside a GPU.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import tyro

from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import read_manifest
from d2f_core.data.plan_reader import PlanReader
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import ModelConfig
from d2f_core.model.text_to_image import TextToImage
from d2f_core.train import ema, zero
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.task import Task
from infra.local.stack import Stack
from pipelines.configs import FinetuneConfig
from tests.latent_tables import write_latents

RUNGS = ("torch", "torch again", "accelerate", "deepspeed", "ray", "data", "job")
ROWS, SHAPE, WARM_UP = 4096, (4, 16, 16), 10
COLUMNS = ("caption", "latent_mean", "latent_std")


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    results: Path | None = None
    rounds: int = 3
    steps: int = 60
    batch: int = 16
    zero_stage: int = 2
    every: int = 10
    """Steps between metrics, and between checkpoints, of the rung `job`."""
    rung: str = ""
    """Run this one rung in this process and print its times: what the command itself calls."""
    uri: str = ""
    """Latent table of that rung."""


def finetune_config(config: OverheadConfig, latents: str, output: str) -> FinetuneConfig:
    return FinetuneConfig(
        model=ModelConfig(base="infra/models/emoji-sd", objective="diff2flow", method="full"),
        latents=latents,
        output=output,
        holdout_rows=0,
        train=TrainConfig(
            num_steps=config.steps, global_batch_size=config.batch, micro_batch_size=config.batch,
            threads_per_worker=1, zero_stage=config.zero_stage, ema=EmaConfig(decay=0.99),  # type: ignore[arg-type]
            log_every=config.every, checkpoint_every=config.every, evaluate_every=0,
        ),
    )  # fmt: skip


class Clock:
    """Times at which steps begin, and losses, both written at the end."""

    def __init__(self, file: str = "", steps: int = 0) -> None:
        self.file, self.steps, self.times, self.losses = file, steps, [], []

    def loss(self, task: TextToImage, network: Any, batch: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        losses = task.loss(network, batch)
        self.losses.append(losses.detach().mean())
        if len(self.times) == self.steps:
            Path(self.file).write_text(self.text())
        return losses

    def text(self) -> str:
        return json.dumps({"times": self.times, "losses": [float(loss) for loss in self.losses]})


def make_task(config: FinetuneConfig) -> TextToImage:
    base = resolve_base(config.model.base)
    return TextToImage(base, config.model, seed=config.train.seed, dtype=torch.float32, device="cpu")


def ready_batches(config: FinetuneConfig, task: TextToImage) -> list[Any]:
    plan = config.plan([read_manifest(config.latents)], COLUMNS)
    parts = [part for chunk in PlanReader(plan, 0, 1, 0) for part in chunk.column("micro_batch")]
    return [task.to_batch(table_to_arrays(pa.ipc.open_stream(part.as_buffer()).read_all())) for part in parts]


def plain_steps(config: FinetuneConfig, kind: str) -> str:
    """The rungs without Ray."""
    torch.set_num_threads(1)
    task, clock, train = make_task(config), Clock(), config.train
    batches = ready_batches(config, task)
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    network: Any = task.module
    if kind == "deepspeed":
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        network = zero.build_engine(task.module, train, 1)
    else:
        optimizer: Any = torch.optim.AdamW(
            parameters, lr=train.learning_rate, betas=(0.9, train.beta2), weight_decay=train.weight_decay, fused=True
        )
    if kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        network, optimizer = accelerator.prepare(task.module, optimizer)
    for step, batch in enumerate(batches):
        loss = clock.loss(task, network, batch).mean()
        if kind == "deepspeed":
            network.backward(loss)
            network.step()
        else:
            accelerator.backward(loss) if kind == "accelerate" else loss.backward()
            clip = accelerator.clip_grad_norm_ if kind == "accelerate" else torch.nn.utils.clip_grad_norm_
            clip(parameters, train.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for average, parameter in zip(averages, parameters, strict=True):
            ema.update(average, parameter.detach(), train.ema.decay_at(step + 1))
    return clock.text()


def timed_task(config: FinetuneConfig, file: str, device: str) -> Task:
    del device
    task, clock = make_task(config), Clock(file, config.train.num_steps)
    return Task(
        module=task.module,
        to_batch=lambda table: task.to_batch(table_to_arrays(table)),
        loss_fn=lambda network, batch: clock.loss(task, network, batch),
    )


def worker_steps(job: dict[str, Any]) -> None:
    Path(job["file"]).write_text(plain_steps(job["config"], "deepspeed"))


def ray_steps(config: FinetuneConfig, kind: str) -> str:
    """The rungs inside Ray Train."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from d2f_core.tracking import start_run
    from d2f_core.train.launch import run_training

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    with tempfile.TemporaryDirectory() as directory:
        file = f"{directory}/times.json"
        if kind == "ray":
            TorchTrainer(
                worker_steps,  # type: ignore[arg-type]
                train_loop_config={"config": config, "file": file},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
                run_config=ray.train.RunConfig(storage_path=directory),
            ).fit()
        else:
            manifest, run = read_manifest(config.latents), None
            if kind == "job":
                run = start_run(
                    experiment="overhead", run_key=config.output, name="overhead", config_yaml="", params={}, tags={}
                )  # fmt: skip
            run_training(
                config=config.train,
                build_task=functools.partial(timed_task, config, file),
                plan=config.plan([manifest], COLUMNS),
                output=config.output,
                identity="overhead",
                tracker=run,
            )
        ray.shutdown()
        return Path(file).read_text()


def run_rung(config: OverheadConfig) -> None:
    output = f"{config.uri}-runs/{config.rung.replace(' ', '-')}-{time.time_ns()}"
    finetune = finetune_config(config, config.uri, output)
    if config.rung == "data":
        never = {"log_every": config.steps, "checkpoint_every": config.steps}
        finetune = finetune_config(config, config.uri, output)
        finetune = FinetuneConfig(**{**vars(finetune), "train": TrainConfig(**{**vars(finetune.train), **never})})
    kind = config.rung.split()[0]
    text = plain_steps(finetune, kind) if kind in ("torch", "accelerate", "deepspeed") else ray_steps(finetune, kind)
    print(f"RESULT {text}")


def call(config: OverheadConfig, rung: str, uri: str) -> dict[str, Any]:
    """One rung in a process of its own: step seconds after the warm-up, and the last losses."""
    command = [sys.executable, "-m", "benchmarks.loop_overhead", "--rung", rung, "--uri", uri]
    for name in ("steps", "batch", "zero-stage", "every"):
        command += [f"--{name}", str(getattr(config, name.replace("-", "_")))]
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if rung == "deepspeed":
        environment |= single
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"rung {rung} failed:\n{done.stderr[-3000:]}")
    found = json.loads(lines[-1].removeprefix("RESULT "))
    seconds = np.diff(found["times"])[WARM_UP:]
    return {
        "step_seconds": statistics.median(seconds),
        "mean_seconds": float(seconds.mean()),
        "losses": found["losses"],
    }


def main() -> None:
    config = tyro.cli(OverheadConfig)
    if config.rung:
        run_rung(config)
        return
    with tempfile.TemporaryDirectory() as directory:
        # Ray's workers give way to every other process (niceness 15), S3 and MLflow on the same cores included, which
        # the bare loop does not.
        os.environ.setdefault("RAY_worker_niceness", "0")
        stack = Stack(directory, tied=True)
        os.environ.update(stack.up().variables)
        try:
            uri = "s3://d2f/overhead/latents"
            fingerprint = autoencoder_fingerprint(resolve_base("infra/models/emoji-sd"))
            write_latents(uri, fingerprint, rows=ROWS, rows_per_file=ROWS, shape=SHAPE, pixels=64, captions=50)
            rounds = [{rung: call(config, rung, uri) for rung in RUNGS} for _ in range(config.rounds)]
        finally:
            stack.down()
    report(config, rounds)


def report(config: OverheadConfig, rounds: list[dict[str, Any]]) -> None:
    table = {}
    for rung in RUNGS:
        error = max(
            abs(a - b) for one in rounds for a, b in zip(one[rung]["losses"], one["torch"]["losses"], strict=True)
        )
        for kind in ("step_seconds", "mean_seconds"):
            ratios = sorted(one[rung][kind] / one["torch"][kind] for one in rounds)
            added = sorted(1000 * (one[rung][kind] - one["torch"][kind]) for one in rounds)
            table.setdefault(rung, {"largest_loss_difference": error})[kind] = {
                "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1],
                "added_ms": statistics.median(added),
            }  # fmt: skip
        row = table[rung]
        step, mean = row["step_seconds"], row["mean_seconds"]
        print(
            f"{rung:12} median step x {step['ratio']:.3f} ({step['least']:.3f} to {step['most']:.3f}), "
            f"{step['added_ms']:+.1f} ms   mean step x {mean['ratio']:.3f}, {mean['added_ms']:+.1f} ms   "
            f"losses within {error:.1e}"
        )
    if config.results:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
        content = {"config": {k: str(v) for k, v in asdict(config).items()}, "machine": machine, "rungs": table}
        content["rounds"] = [{k: {**v, "losses": v["losses"][-1]} for k, v in one.items()} for one in rounds]
        config.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
