"""Images per second of a generation job against a bare diffusers loop with the same model, steps and threads.

    python -m benchmarks.generate_throughput --results docs/results/generate_throughput.json

Both draw the same prompts from the same noises with guidance (one batched forward a step), decode and write PNG files:
the loop to a directory, the job to S3 with its index. Each is run with few and with many images, and the difference
counts, so that starting up does not; the pairs are repeated, and the loop against itself is the control. The images
must be equal, but for rounding of one level in 255.
"""

import io
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
import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image

from d2f_core.batch.output import read_index
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.prompts import checked_rows, write_prompts
from d2f_core.model.base import resolve_base
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.randomness import keyed_normal
from d2f_core.storage import read_bytes
from infra.local.stack import Stack
from pipelines.cli import to_yaml

BASE, GUIDANCE, DISTINCT = "infra/models/emoji-sd", 3.0, 50


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    few: int = 128
    many: int = 640
    steps: int = 10
    batch: int = 16
    threads: int = 2
    rounds: int = 3
    loop: Path | None = None
    """Internal: run the bare loop over this prompt file, into a directory beside it."""
    results: Path | None = None


def bare_loop(config: ThroughputConfig, prompts: Path) -> float:
    """Seconds of drawing; the models are loaded before."""
    torch.set_num_threads(config.threads)
    base = resolve_base(BASE)
    unet: Any = UNet2DConditionModel.from_pretrained(base.path / "unet").eval()
    vae: Any = AutoencoderKL.from_pretrained(base.path / "vae").eval()
    scheduler: Any = DDIMScheduler.from_config(
        dict(base.scheduler_config), timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(config.steps)
    encoder, states = load_text_encoder(base), dict[str, torch.Tensor]()
    rows, target = list(checked_rows(str(prompts))), prompts.with_suffix("")
    target.mkdir(exist_ok=True)
    began = time.perf_counter()
    with torch.inference_mode():
        for caption in {"", *(row["prompt"] for row in rows)}:
            states[caption] = encoder.condition([caption])["text_states"]
        for start in range(0, len(rows), config.batch):
            part = rows[start : start + config.batch]
            x = torch.from_numpy(keyed_normal(0, [row["sample_id"] for row in part], (4, *sample_size(unet))))
            text = torch.cat([states[row["prompt"]] for row in part] + [states[""]] * len(part))
            for timestep in scheduler.timesteps:
                given, null = unet(torch.cat([x, x]), timestep, encoder_hidden_states=text).sample.chunk(2)
                x = scheduler.step(null + GUIDANCE * (given - null), timestep, x).prev_sample
            pixels = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
            images = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for row, image in zip(part, images, strict=True):
                Image.fromarray(image).save(target / f"{row['sample_id']}.png")
    return time.perf_counter() - began


def sample_size(unet: Any) -> tuple[int, int]:
    return unet.config.sample_size, unet.config.sample_size


def run_loop(config: ThroughputConfig, prompts: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.generate_throughput", "--loop", str(prompts)]
    for name in ("steps", "batch", "threads"):
        command += [f"--{name}", str(getattr(config, name))]
    done = subprocess.run(command, env=environment(config), capture_output=True, text=True, timeout=900, check=True)
    return float(done.stdout.split()[-1])


def run_job(config: ThroughputConfig, prompts: Path, output: str) -> float:
    job = GenerateConfig(
        prompts=str(prompts), model=BASE, output=output, steps=(config.steps,), guidance=GUIDANCE, solver="ddim",
        batch_size=config.batch, num_actors=1, cpus_per_actor=config.threads,
    )  # fmt: skip
    file = prompts.with_suffix(".yaml")
    file.write_text(to_yaml(job))
    began = time.perf_counter()
    command = [sys.executable, "-m", "pipelines.generate", "--config", str(file)]
    subprocess.run(command, env=environment(config), capture_output=True, timeout=900, check=True)
    return time.perf_counter() - began


def environment(config: ThroughputConfig) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(config.threads)}


def largest_difference(prompts: Path, output: str) -> int:
    rows = read_index(output).to_pylist()
    worst = 0
    for row in rows:
        ours = np.asarray(Image.open(io.BytesIO(read_bytes(row["image_uri"]))), dtype=int)
        bare = np.asarray(Image.open(prompts.with_suffix("") / f"{row['sample_id']}.png"), dtype=int)
        worst = max(worst, int(np.abs(ours - bare).max()))
    return worst


def run(config: ThroughputConfig, directory: Path) -> dict[str, Any]:
    files = {}
    for count in (config.few, config.many):
        files[count] = directory / f"{count}.jsonl"
        write_prompts(str(files[count]), [f"drawing number {row % DISTINCT}" for row in range(count)])
    rates: dict[str, list[float]] = {"loop": [], "loop again": [], "job": []}
    for number in range(config.rounds):
        for name in rates:
            output = f"s3://d2f/throughput/{number}"
            seconds = {
                count: run_job(config, file, f"{output}-{count}") if name == "job" else run_loop(config, file)
                for count, file in files.items()
            }
            rates[name].append((config.many - config.few) / (seconds[config.many] - seconds[config.few]))
            print(f"round {number}: {name:10} {rates[name][-1]:.2f} images/s   {seconds}", flush=True)
    paired = {name: [a / b for a, b in zip(rates[name], rates["loop"], strict=True)] for name in ("loop again", "job")}
    return {
        "images_per_second": rates,
        "of_the_loop": {name: {"median": statistics.median(each), "all": each} for name, each in paired.items()},
        "largest_difference_of_255": largest_difference(files[config.many], f"s3://d2f/throughput/0-{config.many}"),
    }


def main() -> None:
    config = tyro.cli(ThroughputConfig)
    if config.loop:
        print(bare_loop(config, config.loop))
        return
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(Path(directory, "stack"), tied=True)
        os.environ.update(stack.up().variables)
        try:
            figures = run(config, Path(directory))
        finally:
            stack.down()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    content = {"config": {k: str(v) for k, v in asdict(config).items()}, "machine": machine, **figures}
    print(json.dumps(content["of_the_loop"], indent=1))
    if config.results:
        config.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
