"""The card of a registered model: what it is, how to use it, and what it was made of. Markdown and tags."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_DESCRIPTION_CHARS = 5000
"""What MLflow keeps of a version's description."""
POINTER_CHARS = 200
"""Kept for the line that says what is only in the files."""
MAX_SCHEDULE_CHARS = 1500
TAGGED = frozenset(
    {"task", "objective", "method", "prediction_type", "solver", "steps", "guidance", "shift", "resolution", "base_uri"}
    | {"training.step", "training.teacher", "data_digest"}
)


@dataclass(frozen=True, kw_only=True)
class ModelCardData:
    """What is known of a model beside its `diff2flow.json`."""

    name: str
    alias: str
    run: str
    """Output URI of the training."""
    run_url: str
    """The training's page in MLflow."""
    data_digest: str
    """Digests of the manifests of the latent tables."""
    metrics: Mapping[str, float]
    """Of the checkpoint."""
    config_yaml: str
    """The training's resolved config."""
    has_samples: bool
    """Whether samples.png lies beside the card."""


def model_tags(description: Mapping[str, Any], facts: ModelCardData) -> dict[str, str]:
    """What a browser of the registry filters by; few, for MLflow shows all in each row. The card has the rest."""
    tags = {name: value for name, value in _rows(description, facts).items() if name in TAGGED}
    return tags | {f"metric.{name}": f"{value:.6g}" for name, value in facts.metrics.items()}


def model_card(description: Mapping[str, Any], facts: ModelCardData) -> str:
    """The whole card, README.md."""
    picture = "\n## Samples\n\n![samples of the training's last evaluation](samples.png)\n" if facts.has_samples else ""
    return _summary(description, facts) + picture + _schedule(description) + _config(facts)


def version_description(description: Mapping[str, Any], facts: ModelCardData) -> str:
    """The card, within what MLflow keeps: what does not fit is said to be in the files."""
    text = _summary(description, facts)
    parts = {"the scheduler config (diff2flow.json)": _schedule(description), "config.yaml": _config(facts)}
    left_out = []
    for name, part in parts.items():
        if len(text) + len(part) <= MAX_DESCRIPTION_CHARS - POINTER_CHARS:
            text += part
        else:
            left_out.append(name)
    pointer = f"\nIn this version's files, artifacts/model/: {', '.join(left_out)}.\n" if left_out else ""
    return text[: MAX_DESCRIPTION_CHARS - len(pointer)] + pointer


def _summary(description: Mapping[str, Any], facts: ModelCardData) -> str:
    uri = f"models:/{facts.name}@{facts.alias}"
    metrics = _table({name: f"{value:.6g}" for name, value in facts.metrics.items()})
    return (
        f"A {description['objective']} model on the base `{description['base']['uri']}`, trained at `{facts.run}` "
        f"([run]({facts.run_url})). Time convention: {description['time_convention']}.\n\n"
        f"## Use\n\n{_use(description['task'], uri)}"
        'It needs the base at the place named here, or `model_config={"base_model": DIRECTORY}`, and the package\n'
        "diff2flow-ray installed, which is not among its pip requirements.\n\n"
        f"## What it is\n\n{_table(_rows(description, facts))}\n"
        f"## Metrics of its checkpoint\n\n{metrics or 'None were logged at its step.'}\n"
    )


def _rows(description: Mapping[str, Any], facts: ModelCardData) -> dict[str, str]:
    """All that a version was made of, by name."""
    schedule, training = description["schedule"], description["training"]
    return {
        **{name: description[name] for name in ("task", "objective", "method", "prediction_type")},
        **{name: str(value) for name, value in description["sampling"].items() if value is not None},
        "base_uri": description["base"]["uri"],
        "base_sha256": description["base"]["sha256"],
        "schedule": f"{schedule.get('beta_schedule')} {schedule.get('beta_start')} to {schedule.get('beta_end')}",
        "schedule_sha256": description["schedule_sha256"],
        **{f"training.{name}": str(value) for name, value in training.items()},
        "training.run": facts.run,
        "data_digest": facts.data_digest,
    }


def _use(task: str, uri: str) -> str:
    """A command and a line of Python."""
    if task == "image_to_depth":
        command = f"python -m pipelines.predict_depth depth --model {uri} --source.uri IMAGES --output URI"
        row = '{"image": open("photo.png", "rb").read(), "seed": 1}'
    else:
        command = f"python -m pipelines.generate flow --model {uri} --prompts FILE --output URI"
        row = '{"prompt": "red apple", "seed": 1}'
    call = f'mlflow.pyfunc.load_model("{uri}").predict(pandas.DataFrame([{row}]))'
    return f"```\n{command}\n```\n\n```python\n{call}\n```\n\n"


def _table(rows: Mapping[str, Any]) -> str:
    plain = {name: " ".join(str(value).replace("|", " ").split()) for name, value in rows.items()}
    lines = [f"| {name} | {value} |\n" for name, value in plain.items() if value]
    return "".join(["| | |\n|---|---|\n", *lines]) if lines else ""


def _schedule(description: Mapping[str, Any]) -> str:
    text = json.dumps(description["schedule"], sort_keys=True)
    if len(text) > MAX_SCHEDULE_CHARS:  # a table of betas
        return ""
    return f"\n## Scheduler config of the base\n\n```json\n{text}\n```\n"


def _config(facts: ModelCardData) -> str:
    return f"\n## Config of the training\n\n```yaml\n{facts.config_yaml}```\n" if facts.config_yaml else ""
