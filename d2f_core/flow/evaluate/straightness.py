"""Straightness of a model's paths from noise to data, which determines how few evaluations it needs."""

import itertools
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from d2f_core.device import reserved_device
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.estimates import Estimate
from d2f_core.flow.evaluate.compared_models import EvaluateJob
from d2f_core.flow.evaluate.image_metrics import MADE_DRAWS
from d2f_core.flow.generate.plan import Plan
from d2f_core.flow.generate.prompts import checked_rows
from d2f_core.model.artifact import load_model
from d2f_core.model.image_sizes import sizes_of_new_images
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.guidance import guided
from d2f_core.objective.solver import TIME_GRIDS, Field
from d2f_core.randomness import keyed_normal
from d2f_core.tracking import resolve_model


@torch.inference_mode()
def straightness(field: Field, noise: Tensor, times: Tensor) -> Tensor:
    """Deviation [batch] of the paths from noise [batch, *dims] along `times` [steps + 1] from straight lines.

    The mean over the Euler path of |v(x_t, t) - (x_1 - x_0)|^2 / |x_1 - x_0|^2: 0 where one step would do.
    Source: Liu et al., 2022, arXiv:2209.03003, equation 4, relative to the length of the path.
    """
    x, velocities = noise, []
    for start, end in itertools.pairwise(times):
        velocities.append(field(x, start.expand(len(x))))
        x = x + (end - start) * velocities[-1]
    line = (x - noise).flatten(1).double()
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for velocity, step in zip(velocities, times.diff(), strict=True):
        total += step * (velocity.flatten(1).double() - line).square().sum(1)
    return total / line.square().sum(1) / (times[-1] - times[0])


def follow_paths(uri: str, plan: Plan, rows: list[dict[str, Any]], steps: int) -> np.ndarray:
    """Straightness of a model's guided paths from the noises of these prompts, float64 [prompts]."""
    device = reserved_device()
    model = load_model(resolve_model(uri), base_prediction=plan.base_prediction).to(device)
    encoder = load_text_encoder(model.base, device=device)
    found = []
    for request in plan.requests(rows)[: len(rows)]:
        shape = model.base.latent_shape(request.height, request.width)
        noise = torch.from_numpy(keyed_normal(request.seed, [request.sample_id], shape)).to(device)
        conditions = [encoder.condition([text]) for text in (request.prompt, request.negative_prompt)]
        for condition in conditions:
            if "pooled_text" in condition:
                condition["time_ids"] = sizes_of_new_images(1, request.height, request.width).to(device)
        field = guided(model.velocity_field, request.guidance, *conditions)
        found.append(straightness(field, noise, TIME_GRIDS[request.time_grid](steps, request.shift).to(device)))
    return torch.cat(found).cpu().numpy()


def follow_all(job: EvaluateJob) -> dict[str, Estimate]:
    """Mean straightness by role, over the first prompts; needs a running Ray. Processes `score.num_actors` models in
    parallel.
    """
    config = job.config
    rows = list(itertools.islice(checked_rows(config.prompts), config.straightness_prompts))
    if not rows:
        return {}
    task = ray.remote(follow_paths).options(num_cpus=config.score.cpus_per_actor, num_gpus=config.score.gpus_per_actor)
    pending: list[ray.ObjectRef] = []
    for each in job.compared:
        # Not all at once, because each is a process that loads all libraries and takes a GPU.
        if (done := len(pending) - config.score.num_actors + 1) > 0:
            ray.wait(pending, num_returns=done)
        pending.append(task.remote(each.uri, each.job.plan, rows, config.straightness_steps))
    draws = bootstrap_counts(len(rows), config.measure.replicates, MADE_DRAWS)
    return {
        compared.role: Estimate.of(float(values.mean()), draws @ values / len(values), len(values))
        for compared, values in zip(job.compared, ray.get(pending), strict=True)
    }
