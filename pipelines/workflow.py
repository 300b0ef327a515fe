"""All stages in one Ray job: `ray job submit --working-dir . -- python -m pipelines.workflow quickstart`.

make_dataset -> encode_latents -> finetune -> register -> generate (base, flow) -> contact_sheet; or `reflow`, which
pipelines/reflow.py describes. A stage whose output is complete for the same config and inputs is skipped; after a kill
the same command goes on.
"""

import json

import ray

from d2f_core.inference.prompts import table_captions, write_prompts
from d2f_core.model.base import resolve_base
from d2f_core.storage import check_reachable, join, write_bytes
from d2f_core.tracking import check_tracking, find_run
from pipelines import encode_latents, make_dataset, reflow
from pipelines.cli import run_job
from pipelines.reflow import ReflowConfig
from pipelines.workflow_config import WorkflowConfig
from pipelines.workflow_stages import (
    Outputs,
    Workflow,
    contact_sheet_stage,
    finetune_stage,
    generate_stage,
    register_stage,
)


def check(config: WorkflowConfig | ReflowConfig) -> None:
    """Refuse what cannot work before the first stage runs."""
    if isinstance(config, ReflowConfig):
        reflow.check(config)
        return
    check_reachable(config.output, write=True)
    check_tracking()
    resolve_base(config.finetune.model.base)


def main(config: WorkflowConfig | ReflowConfig) -> None:
    if isinstance(config, ReflowConfig):
        reflow.main(config)
        return
    check(config)
    ray.init(ignore_reinit_error=True)
    flow = Workflow(config.output)
    base = resolve_base(config.finetune.model.base).content_hash
    images = flow.table("make_dataset", "images", make_dataset.main, config.dataset)
    latents = flow.table(
        "encode_latents", "images", encode_latents.main, config.wired_encode(), images=images["digest"], base=base
    )
    model = finetune_stage(flow, config, latents=latents["digest"], base=base)
    version = register_stage(flow, config, model)
    write_prompts(config.prompts_uri, config.prompts)
    write_prompts(config.captions_uri, table_captions(config.dataset.output))
    made = [
        generate_stage(flow, config, name, uri, digest)
        for name, uri, digest in (
            ("generate_base", config.finetune.model.base, base),
            ("generate_flow", version["uri"], version["digest"]),
        )
    ]
    sheet = contact_sheet_stage(flow, config, *made)
    _write_summary(flow, config, version, sheet)


def _write_summary(flow: Workflow, config: WorkflowConfig, version: Outputs, sheet: Outputs) -> None:
    handle = find_run(experiment=config.finetune.experiment, run_key=config.finetune.output)
    summary = {
        "stages": [result.summary() for result in flow.results],
        "experiment_id": handle and handle.experiment_id,
        "run_id": handle and handle.run_id,
        "registered_model": version["name"],
        "model_version": version["version"],
        "contact_sheet": sheet["uri"],
    }
    write_bytes(join(config.output, "summary.json"), json.dumps(summary, indent=2).encode())


if __name__ == "__main__":
    from pipelines.workflow_recipes import REFLOW, WORKFLOW

    run_job("workflow", {**WORKFLOW, "reflow": REFLOW}, main, check)
