"""A v-prediction twin of emoji-sd, for the comparison of losses on that kind of base model.

    python -m benchmarks.v_twin --output /path/to/emoji-sd-v
    python -m benchmarks.v_twin --base /path/to/emoji-sd-v --zero-snr --steps 200 --output /path/to/emoji-sd-zero-snr

emoji-sd's own weights are trained on for a while with its own data and loss; only what the network predicts is changed
from epsilon to v, and on request the schedule to one of zero terminal SNR. The result is a base model in diffusers'
layout, like emoji-sd itself.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.objective_judging import images_as_data
from benchmarks.objective_recipes import BATCH, task_for, training_of
from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.data.sample_order import SampleOrder
from d2f_core.model.base import resolve_base


@dataclass(frozen=True, kw_only=True)
class TwinConfig:
    output: Path
    base: str = "infra/models/emoji-sd"
    zero_snr: bool = False
    """Rescale the schedule so that its last timestep is noise alone (Lin et al., 2024, arXiv:2305.08891)."""
    steps: int = 1500
    rate: float = 5e-4
    threads: int = 2
    """Of torch."""


def main() -> None:
    config = tyro.cli(TwinConfig)
    torch.set_num_threads(config.threads)
    if (config.output / "unet").exists():
        raise SystemExit(f"{config.output} exists. Remove it, or choose another --output.")
    partial = config.output.with_name(f"{config.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(config.base, partial)
    file = partial / "scheduler/scheduler_config.json"
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": config.zero_snr}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}, indent=2))
    # The weights, which predict epsilon as yet, are loaded as what they are.
    task = task_for(config.base, "diffusion", "full", 0)
    task.base = resolve_base(str(partial))
    data = images_as_data(config.base, MakeDatasetConfig(style="twemoji", subset="core"))
    order = SampleOrder(num_rows=len(data.captions), batch=BATCH, window_rows=len(data.captions))
    for point in training_of(task, data.rows, order, config.steps, config.rate).run(range(250, config.steps, 250)):
        print(f"step {point['step']}  loss {point['loss']:.4f}", flush=True)
    unet: Any = task.module
    unet.save_pretrained(partial / "unet")
    partial.rename(config.output)


if __name__ == "__main__":
    main()
