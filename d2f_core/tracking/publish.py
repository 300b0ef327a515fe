"""Registers a finished training's model: takes artifact, card and loader, and creates a version with an alias.

The system that trained the model provides its card, its loader for MLflow, and the name of its type.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_core.storage import exists, join, read_bytes
from d2f_core.tracking.pyfunc_files import Loader
from d2f_core.tracking.registry import MAX_DESCRIPTION_CHARS, ModelVersionInfo, NewVersion, register_model
from d2f_core.tracking.runs import RunHandle, find_run, run_file, run_metrics, run_tags
from d2f_core.tracking.server import TrackingError

EVALUATION = "evaluation.json"
"""A checkpoint's metrics, inside its directory."""
CARD, CONFIG, SAMPLES = "README.md", "config.yaml", "samples.png"
POINTER_CHARS = 200
"""Characters of a version's description reserved for the line that refers to the files for the rest."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Facts about the training of a published model, from MLflow and the checkpoint."""

    run: str
    """Output URI of the training, which is the key of its run."""
    run_url: str
    """The run's page in MLflow."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Metrics of the checkpoint that the model was made from."""
    config_yaml: str
    """The training's resolved config; empty when it was not logged."""
    has_samples: bool
    """Whether the run has a picture of samples from its last evaluation."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Description of a version, for people and programs."""

    text: str
    """Text of README.md among the version's files."""
    description: str
    """Description on the version's page in MLflow: Markdown, at most 5,000 characters."""
    tags: Mapping[str, str]


def training_run(run: str, experiment: str) -> RunHandle:
    """The MLflow run of a training.

    Args:
        run: output URI of the training.
        experiment: MLflow experiment of its run.

    Raises:
        TrackingError: there is none.
    """
    handle = find_run(experiment=experiment, run_key=run)
    if handle is None:
        raise TrackingError(
            f"MLflow has no run of {run!r} in the experiment {experiment!r}. Give the experiment that the training was "
            "logged to."
        )
    return handle


def publish(
    directory: Path,
    handle: RunHandle,
    *,
    run: str,
    name: str,
    alias: str,
    training: Mapping[str, Any],
    card: Callable[[TrainingRecord], ModelCard],
    loader: Loader | None,
    model_type: str,
) -> ModelVersionInfo:
    """Register a model directory as a version of `name`; repeating it with the same content changes nothing.

    Args:
        handle: the training's run.
        run: output URI of the training.
        training: what the model says of it: `step`, and `checkpoint`, the URI of the one that it was made of.
        loader: how MLflow's own tools open it; None: they do not.
        model_type: the system's name in MLflow's model list.

    Raises:
        TrackingError: a damaged evaluation, or MLflow cannot be used.
    """
    config, samples = run_file(handle, CONFIG), run_file(handle, SAMPLES)
    record = TrainingRecord(
        run=run,
        run_url=handle.url,
        tags=run_tags(handle),
        metrics=checkpoint_metrics(handle, training),
        config_yaml=(config or b"").decode(),
        has_samples=samples is not None,
    )
    made = card(record)
    files = {CARD: made.text.encode(), CONFIG: config, SAMPLES: samples}
    new = NewVersion(
        model_dir=directory,
        name=name,
        model_type=model_type,
        tags=made.tags,
        description=made.description,
        loader=loader,
        files={file: content for file, content in files.items() if content},
        step=int(training.get("step", 0)),
        metrics=record.metrics,
    )
    return register_model(handle, new, alias=alias)


def checkpoint_metrics(handle: RunHandle, training: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the checkpoint that a model was made from: its evaluation, or else what the run logged at that step.

    Raises:
        TrackingError: the evaluation was damaged.
    """
    checkpoint = training.get("checkpoint")
    place = join(checkpoint, EVALUATION) if checkpoint else ""
    if not place or not exists(place):
        return run_metrics(handle, int(training["step"])) if "step" in training else {}
    try:
        return {name: float(value) for name, value in json.loads(read_bytes(place))["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrackingError(f"{place} is damaged ({error}). Delete it, and resume the training.") from None


def table(rows: Mapping[str, Any]) -> str:
    """A table of names and values; a row without a value is left out."""
    plain = {name: " ".join(str(value).replace("|", " ").split()) for name, value in rows.items()}
    lines = [f"| {name} | {value} |\n" for name, value in plain.items() if value]
    return "".join(["| | |\n|---|---|\n", *lines]) if lines else ""


def metrics_table(record: TrainingRecord) -> str:
    """The metrics of the checkpoint that the model was made from."""
    found = table({name: f"{value:.6g}" for name, value in record.metrics.items()})
    return found or "None were logged at its step."


def metric_tags(record: TrainingRecord) -> dict[str, str]:
    """The same as tags of a version."""
    return {f"metric.{name}": f"{value:.6g}" for name, value in record.metrics.items()}


def config_section(record: TrainingRecord) -> str:
    """The training's config; empty when it was not logged."""
    return f"\n## Config of the training\n\n```yaml\n{record.config_yaml}```\n" if record.config_yaml else ""


def version_page(summary: str, parts: Mapping[str, str]) -> str:
    """The card, cut to the length that MLflow stores, with a pointer to the files for what was left out.

    Args:
        summary: beginning of the card.
        parts: the rest, by where else it stands in the version's files.
    """
    text, left_out = summary, []
    for name, part in parts.items():
        if len(text) + len(part) <= MAX_DESCRIPTION_CHARS - POINTER_CHARS:
            text += part
        else:
            left_out.append(name)
    pointer = f"\nIn this version's files, artifacts/model/: {', '.join(left_out)}.\n" if left_out else ""
    return text[: MAX_DESCRIPTION_CHARS - len(pointer)] + pointer
