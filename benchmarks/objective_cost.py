"""What diff2flow costs beside the diffusion loss: paired step times on the shipped network, and counts.

python -m benchmarks.objective_cost [--rounds 60] [--batch 16] [--json FILE]

In every round each loss makes one forward and backward pass on the same rows, in turn, and `diffusion` a second one:
what the ratio of its two passes spreads is the finest difference that can be claimed.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from d2f_core.model.base import resolve_base
from d2f_core.model.denoiser import as_denoiser, load_unet
from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.loss import LOSSES

TURNS = ("diffusion", "diff2flow", "flow_matching", "diffusion again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--base", default="infra/models/emoji-sd")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    base = resolve_base(arguments.base)
    unet = load_unet(base)
    field = VelocityField(as_denoiser(unet), base.schedule, base.prediction_type)
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, arguments.batch, 4, 16, 16, generator=generator)
    uniform = torch.rand(arguments.batch, generator=generator)
    states = torch.randn(arguments.batch, 16, unet.config["cross_attention_dim"], generator=generator)

    def step(name: str) -> float:
        began = time.perf_counter()
        LOSSES[name](field, data, noise, uniform, text_states=states).mean().backward()
        unet.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    operations = {}
    for name in LOSSES:
        with FlopCounterMode(display=False) as counter:
            step(name)
        operations[name] = counter.get_total_flops()
    for _ in range(3):
        step("diffusion")
    # The order turns with the rounds, so that no loss always follows the same one.
    seconds: dict[str, list[float]] = {name: [] for name in TURNS}
    for number in range(arguments.rounds):
        for index in range(len(TURNS)):
            name = TURNS[(index + number) % len(TURNS)]
            seconds[name].append(step(name.removesuffix(" again")))
    rows = []
    print("| loss | GFLOP a step | median ms | step time / diffusion: median (quartiles) |\n|---|---|---|---|")
    for name in TURNS:
        ratios = [one / other for one, other in zip(seconds[name], seconds["diffusion"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if name != "diffusion" else (1.0, 1.0, 1.0)
        count = operations[name.removesuffix(" again")]
        rows.append({"loss": name, "flop": count, "ratio": middle, "quartiles": [low, high], "seconds": seconds[name]})
        median = 1000 * statistics.median(seconds[name])
        print(f"| {name} | {count / 1e9:.3f} | {median:.1f} | {middle:.4f} ({low:.3f} to {high:.3f}) |")
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 2}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
