"""The card of a registered model: what it is, how to use it, and what it was made from. Markdown and tags."""

import json
from collections.abc import Mapping
from typing import Any

from d2f_core.tracking.publish import (
    ModelCard,
    TrainingRecord,
    config_section,
    metric_tags,
    metrics_table,
    table,
    version_page,
)

DIGEST_TAG = "d2f.latents_digest"
"""Tag of a training's run with the digests of its latent tables' manifests."""
MAX_SCHEDULE_CHARS = 1500
TAGGED = frozenset(
    {"task", "objective", "method", "prediction_type", "solver", "steps", "guidance", "shift", "resolution", "base_uri"}
    | {"training.step", "training.teacher", "data_digest"}
)


def write_card(description: Mapping[str, Any], record: TrainingRecord, uri: str) -> ModelCard:
    """Make the card of a model.

    Args:
        description: the model's `diff2flow.json`.
        uri: URI for loading the model, `models:/NAME@ALIAS`.
    """
    return ModelCard(
        text=model_card(description, record, uri),
        description=version_page(
            _summary(description, record, uri),
            {"the scheduler config (diff2flow.json)": _schedule(description), "config.yaml": config_section(record)},
        ),
        tags=model_tags(description, record),
    )


def model_tags(description: Mapping[str, Any], record: TrainingRecord) -> dict[str, str]:
    """Tags for filtering in the registry; few, because MLflow shows all of them in each row. The card has the rest."""
    tags = {name: value for name, value in _rows(description, record).items() if name in TAGGED}
    return tags | metric_tags(record)


def model_card(description: Mapping[str, Any], record: TrainingRecord, uri: str) -> str:
    """The full card, as README.md."""
    picture = (
        "\n## Samples\n\n![samples of the training's last evaluation](samples.png)\n" if record.has_samples else ""
    )
    return _summary(description, record, uri) + picture + _schedule(description) + config_section(record)


def _summary(description: Mapping[str, Any], record: TrainingRecord, uri: str) -> str:
    return (
        f"A {description['objective']} model on the base `{description['base']['uri']}`, trained at `{record.run}` "
        f"([run]({record.run_url})). Time convention: {description['time_convention']}.\n\n"
        f"## Use\n\n{_use(description['task'], uri)}"
        'It needs the base at the place named here, or `model_config={"base_model": DIRECTORY}`, and the package\n'
        "diff2flow-ray from its source, `pip install --no-deps DIRECTORY`, beside the packages of requirements.txt.\n\n"
        f"## What it is\n\n{table(_rows(description, record))}\n"
        f"## Metrics of its checkpoint\n\n{metrics_table(record)}\n"
    )


def _rows(description: Mapping[str, Any], record: TrainingRecord) -> dict[str, str]:
    """Everything that a version was made from, by name."""
    schedule, training = description["schedule"], description["training"]
    return {
        **{name: description[name] for name in ("task", "objective", "method", "prediction_type")},
        **{name: str(value) for name, value in description["sampling"].items() if value is not None},
        **{f"captions.{name}": str(value) for name, value in description.get("captions", {}).items()},
        "base_uri": description["base"]["uri"],
        "base_sha256": description["base"]["sha256"],
        "schedule": f"{schedule.get('beta_schedule')} {schedule.get('beta_start')} to {schedule.get('beta_end')}",
        "schedule_sha256": description["schedule_sha256"],
        **{f"training.{name}": str(value) for name, value in training.items()},
        "training.run": record.run,
        "data_digest": record.tags.get(DIGEST_TAG, ""),
    }


def _use(task: str, uri: str) -> str:
    """How to use the model: a command and a line of Python."""
    if task == "image_to_depth":
        command = f"python -m pipelines.predict_depth depth --model {uri} --source.uri IMAGES --output URI"
        row = '{"image": open("photo.png", "rb").read(), "seed": 1}'
    else:
        command = f"python -m pipelines.generate flow --model {uri} --prompts FILE --output URI"
        row = '{"prompt": "red apple", "seed": 1}'
    call = f'mlflow.pyfunc.load_model("{uri}").predict(pandas.DataFrame([{row}]))'
    return f"```\n{command}\n```\n\n```python\n{call}\n```\n\n"


def _schedule(description: Mapping[str, Any]) -> str:
    text = json.dumps(description["schedule"], sort_keys=True)
    if len(text) > MAX_SCHEDULE_CHARS:  # a table of betas
        return ""
    return f"\n## Scheduler config of the base\n\n```json\n{text}\n```\n"
