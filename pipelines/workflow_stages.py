"""The workflows' stages: the inputs of each, the key by which it is skipped, and its outputs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from d2f_core.data.manifest import manifest_exists, read_manifest
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.flow.evaluate.job import REPORT_NAME
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.identity import stage_key
from d2f_core.model.artifact import DESCRIPTION
from d2f_core.model.base import described_copy
from d2f_core.stages import StageOutcome, StageResult, run_stage
from d2f_core.storage import exists, join, write_bytes
from d2f_core.tracking import TrackingError, find_run, pin_model
from pipelines import contact_sheet, evaluate, finetune, generate, register
from pipelines.configs import FinetuneConfig
from pipelines.workflow_config import WorkflowConfig

Outputs = dict[str, Any]


class Drawn(Protocol):
    """Config of a workflow that lets base and trained model draw the same prompts."""

    @property
    def output(self) -> str: ...
    @property
    def prompts(self) -> Sequence[str]: ...
    def wired_generate(self, model: str, output: str) -> GenerateConfig: ...
    def wired_sheet(self, *generations: str) -> ContactSheetConfig: ...
    def prediction_of(self, model: str) -> str: ...


@dataclass
class Workflow:
    """Runs stages one after another and keeps their results."""

    output: str
    told: Mapping[str, str] = field(default_factory=dict)
    """Description of every stage for the waiting user, in order of the stages; empty: stages are shown by name."""
    results: list[StageResult] = field(default_factory=list)

    def stage(
        self,
        name: str,
        key: str,
        unit: str,
        run: Callable[[], StageOutcome],
        still_there: Callable[[Outputs], bool],
    ) -> Outputs:
        place = f"[{list(self.told).index(name) + 1}/{len(self.told)}] " if name in self.told else ""
        result = run_stage(
            name,
            record_uri=join(self.output, f"{name}.json"),
            key=key,
            unit=unit,
            run=run,
            still_there=still_there,
            told=place + self.told.get(name, name),
        )
        self.results.append(result)
        return result.outputs

    def table(self, name: str, unit: str, main: Callable[[Any], object], config: Any, **inputs: str) -> Outputs:
        def run() -> StageOutcome:
            main(config)
            manifest = read_manifest(config.output)
            return StageOutcome(count=manifest.num_rows, outputs={"uri": config.output, "digest": manifest.digest})

        return self.stage(name, stage_key(config, inputs), unit, run, table_is_there)


def finetune_stage(flow: Workflow, config: WorkflowConfig, **inputs: str) -> Outputs:
    return finetune_with(flow, "finetune", config.wired_finetune(), **inputs)


def finetune_with(flow: Workflow, name: str, config: FinetuneConfig, **inputs: str) -> Outputs:
    def run() -> StageOutcome:
        done = finetune.main(config)
        digest = described_copy(done.model).hash()
        return StageOutcome(count=done.step, outputs={"uri": done.model, "digest": digest})

    key = stage_key(config, inputs)
    return flow.stage(name, key, "steps", run, lambda done: exists(join(done["uri"], DESCRIPTION)))


def register_with(
    flow: Workflow, name: str, config: RegisterConfig, training: FinetuneConfig, model: Outputs
) -> Outputs:
    wired = replace(config, run=training.output, model=model["uri"], experiment=training.experiment)

    def run() -> StageOutcome:
        info = register.main(wired)
        outputs = {"uri": info.uri, "digest": info.content_hash, "name": info.name, "version": info.version}
        return StageOutcome(count=1, outputs=outputs)

    return flow.stage(name, stage_key(wired, {"model": model["digest"]}), "versions", run, version_is_there)


def evaluate_with(flow: Workflow, name: str, config: EvaluateConfig, model: Outputs, **inputs: str) -> Outputs:
    def run() -> StageOutcome:
        verdict = evaluate.main(config)
        outputs = {"uri": join(config.output, REPORT_NAME), "passed": verdict.passed}
        return StageOutcome(count=len(config.evaluations), outputs=outputs)

    key = stage_key(config, {"model": model["digest"], **inputs})
    return flow.stage(name, key, "points", run, lambda done: exists(done["uri"]))


def generate_stage(flow: Workflow, config: Drawn, models: Mapping[str, tuple[str, str]]) -> list[Outputs]:
    """Generate each model's images with one pool of actors.

    Args:
        models: (URI, digest) of each model, by the name of its generation.
    """
    wired: dict[str, GenerateConfig] = {}
    keys, same_for_all = {}, config.wired_generate("", "")
    for name, (uri, digest) in models.items():
        # The key is part of the URI, so that images of another model or of other prompts are kept apart.
        inputs = {"model": digest, "prompts": json.dumps(config.prompts)}
        if told := config.prediction_of(uri):
            inputs["base_prediction"] = told
        keys[name] = stage_key(same_for_all, inputs)
        wired[name] = config.wired_generate(uri, join(config.output, "generations", f"{name}-{keys[name][:12]}"))

    def run() -> StageOutcome:
        made = generate.run_all(list(wired.values()))
        tables = [{"uri": one.output, "digest": each.digest} for one, each in zip(wired.values(), made, strict=True)]
        return StageOutcome(count=sum(each.num_rows for each in made), outputs={"tables": tables})

    key = stage_key(same_for_all, keys)
    done = flow.stage("generate", key, "images", run, lambda there: all(map(table_is_there, there["tables"])))
    return done["tables"]


def contact_sheet_stage(flow: Workflow, config: Drawn, *made: Outputs) -> Outputs:
    wired = config.wired_sheet(*(one["uri"] for one in made))

    def run() -> StageOutcome:
        return StageOutcome(count=len(config.prompts), outputs={"uri": contact_sheet.main(wired)})

    key = stage_key(wired, {str(number): one["digest"] for number, one in enumerate(made)})
    return flow.stage("contact_sheet", key, "prompts", run, lambda done: exists(done["uri"]))


def write_summary(flow: Workflow, training: FinetuneConfig, version: Outputs, sheet: str) -> None:
    """Write summary.json: the result of every stage, the MLflow ids of run and model version, and the picture's URI."""
    handle = find_run(experiment=training.experiment, run_key=training.output)
    summary = {
        "stages": [result.summary() for result in flow.results],
        "experiment_id": handle and handle.experiment_id,
        "run_id": handle and handle.run_id,
        "registered_model": version["name"],
        "model_version": version["version"],
        "contact_sheet": sheet,
    }
    write_bytes(join(flow.output, "summary.json"), json.dumps(summary, indent=2).encode())


def table_is_there(outputs: Outputs) -> bool:
    return manifest_exists(outputs["uri"]) and read_manifest(outputs["uri"]).digest == outputs["digest"]


def version_is_there(outputs: Outputs) -> bool:
    """Whether the registry still has the version of a stage's outputs."""
    try:
        return pin_model(outputs["uri"]) == outputs["uri"]
    except TrackingError:
        return False
