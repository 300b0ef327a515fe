"""All stages in one Ray job: `ray job submit --working-dir . -- python -m pipelines.workflow quickstart`.

make_dataset -> encode_latents -> finetune -> register -> generate (base, flow) -> contact_sheet. A stage whose output
is complete for the same config and inputs is skipped; after a kill the same command goes on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from d2f_core.data.manifest import manifest_exists, read_manifest
from d2f_core.inference.prompts import write_prompts
from d2f_core.model.artifact import DESCRIPTION
from d2f_core.model.base import hash_directory, local_copy, resolve_base
from d2f_core.stages import StageOutcome, StageResult, run_stage, stage_key
from d2f_core.storage import check_reachable, exists, join, write_bytes
from d2f_core.tracking import TrackingError, check_tracking, find_run, pin_model
from pipelines import contact_sheet, encode_latents, finetune, generate, make_dataset, register
from pipelines.cli import run_job
from pipelines.workflow_config import WorkflowConfig

Outputs = dict[str, Any]


@dataclass
class Workflow:
    output: str
    results: list[StageResult] = field(default_factory=list)

    def stage(
        self,
        name: str,
        key: str,
        unit: str,
        run: Callable[[], StageOutcome],
        still_there: Callable[[Outputs], bool],
    ) -> Outputs:
        record = join(self.output, f"{name}.json")
        self.results.append(run_stage(name, record_uri=record, key=key, unit=unit, run=run, still_there=still_there))
        return self.results[-1].outputs

    def table(self, name: str, unit: str, main: Callable[[Any], object], config: Any, **inputs: str) -> Outputs:
        def run() -> StageOutcome:
            main(config)
            manifest = read_manifest(config.output)
            return StageOutcome(count=manifest.num_rows, outputs={"uri": config.output, "digest": manifest.digest})

        return self.stage(name, stage_key(config, inputs), unit, run, _table_is_there)


def check(config: WorkflowConfig) -> None:
    """Refuse what cannot work before the first stage runs."""
    check_reachable(config.output, write=True)
    check_tracking()
    resolve_base(config.finetune.model.base)


def main(config: WorkflowConfig) -> None:
    check(config)
    ray.init(ignore_reinit_error=True)
    flow = Workflow(config.output)
    base = resolve_base(config.finetune.model.base).content_hash
    images = flow.table("make_dataset", "images", make_dataset.main, config.dataset)
    latents = flow.table(
        "encode_latents", "images", encode_latents.main, config.wired_encode(), images=images["digest"], base=base
    )
    model = _finetune(flow, config, latents=latents["digest"], base=base)
    version = _register(flow, config, model)
    write_prompts(config.prompts_uri, config.prompts)
    made = [
        _generate(flow, config, name, uri, digest)
        for name, uri, digest in (
            ("generate_base", config.finetune.model.base, base),
            ("generate_flow", version["uri"], version["digest"]),
        )
    ]
    sheet = _contact_sheet(flow, config, *made)
    _write_summary(flow, config, version, sheet)


def _finetune(flow: Workflow, config: WorkflowConfig, **inputs: str) -> Outputs:
    wired = config.wired_finetune()

    def run() -> StageOutcome:
        done = finetune.main(wired)
        digest = hash_directory(local_copy(done.model))
        return StageOutcome(count=done.step, outputs={"uri": done.model, "digest": digest})

    key = stage_key(wired, inputs)
    return flow.stage("finetune", key, "steps", run, lambda done: exists(join(done["uri"], DESCRIPTION)))


def _register(flow: Workflow, config: WorkflowConfig, model: Outputs) -> Outputs:
    wired = config.wired_register(model["uri"])

    def run() -> StageOutcome:
        info = register.main(wired)
        outputs = {"uri": info.uri, "digest": info.content_hash, "name": info.name, "version": info.version}
        return StageOutcome(count=1, outputs=outputs)

    return flow.stage("register", stage_key(wired, {"model": model["digest"]}), "versions", run, _version_is_there)


def _generate(flow: Workflow, config: WorkflowConfig, name: str, model: str, digest: str) -> Outputs:
    # The key is part of the place: images of another model or other prompts never meet these.
    key = stage_key(config.wired_generate("", ""), {"model": digest, "prompts": json.dumps(config.prompts)})
    wired = config.wired_generate(model, join(config.output, "generations", f"{name}-{key[:12]}"))
    return flow.table(name, "images", generate.main, wired, model=digest, prompts=key)


def _contact_sheet(flow: Workflow, config: WorkflowConfig, *made: Outputs) -> Outputs:
    wired = config.wired_sheet(*(one["uri"] for one in made))

    def run() -> StageOutcome:
        return StageOutcome(count=len(config.prompts), outputs={"uri": contact_sheet.main(wired)})

    key = stage_key(wired, {str(number): one["digest"] for number, one in enumerate(made)})
    return flow.stage("contact_sheet", key, "prompts", run, lambda done: exists(done["uri"]))


def _table_is_there(outputs: Outputs) -> bool:
    return manifest_exists(outputs["uri"]) and read_manifest(outputs["uri"]).digest == outputs["digest"]


def _version_is_there(outputs: Outputs) -> bool:
    try:
        return pin_model(outputs["uri"]) == outputs["uri"]
    except TrackingError:
        return False


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
    from pipelines.workflow_recipes import WORKFLOW

    run_job("workflow", WORKFLOW, main, check)
