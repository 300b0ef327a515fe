"""The card of a registered matcher: what it is, how to use it, and what it was made from. Markdown and tags."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from d2f_core.correspondence.artifact import MatcherDescription
from d2f_core.tracking.publish import (
    ModelCard,
    TrainingRecord,
    config_section,
    metric_tags,
    metrics_table,
    table,
    version_page,
)

PAIRS_TAG = "d2f.pairs"
"""Tag of a training's run: the pairs that its PCK was measured on."""
TAGGED = (
    "task", "size", "normalisation", "base_uri", "teachers", "training.step", "features_digest", "rank",
)  # fmt: skip
"""Rows that are tags of the version too: few, because MLflow shows all of them in each row."""


def write_card(description: MatcherDescription, record: TrainingRecord, uri: str) -> ModelCard:
    """Make the card of a matcher.

    Args:
        uri: URI for loading it, `models:/NAME@ALIAS`.
    """
    summary, rows = _summary(description, record, uri), _rows(description, record)
    return ModelCard(
        text=summary + config_section(record),
        description=version_page(summary, {"config.yaml": config_section(record)}),
        tags={name: rows[name] for name in TAGGED if rows[name]} | metric_tags(record),
    )


def _summary(description: MatcherDescription, record: TrainingRecord, uri: str) -> str:
    pairs = f"Measured on {pairs}.\n\n" if (pairs := record.tags.get(PAIRS_TAG, "")) else ""
    return (
        "A matcher for semantic correspondence: for points of one image it says where they lie in another image of a "
        f"thing of the same kind. Adapters of the vision transformer `{description.student.base}`, trained at "
        f"`{record.run}` ([run]({record.run_url})).\n\n"
        f"## Use\n\n{_use(uri)}"
        "Points are (x, y) in pixels of their image; the centre of its first pixel is (0.5, 0.5). The confidence of a "
        "point is the cosine of its feature with the place that was found, which is no probability.\n\n"
        'It needs the base at the place named here, or `model_config={"base_model": DIRECTORY}`, and the package\n'
        "diff2flow-ray from its source, `pip install --no-deps DIRECTORY`, beside the packages of requirements.txt.\n\n"
        f"## What it is\n\n{table(_rows(description, record))}\n"
        f"## Metrics of its checkpoint\n\n{metrics_table(record)}\n{pairs}"
    )


def _use(uri: str) -> str:
    """Commands and lines of Python."""
    row = '{"image0": open("a.png", "rb").read(), "image1": open("b.png", "rb").read(), "keypoints0": [[120, 80]]}'
    return (
        "```\n"
        f"python -m pipelines.evaluate_matches own --uris {uri} --pairs.uri PAIRS --output URI\n"
        f"python -m pipelines.export transformers --model {uri} --output DIRECTORY\n"
        "```\n\n```python\n"
        f'mlflow.pyfunc.load_model("{uri}").predict(pandas.DataFrame([{row}]))\n'
        "```\n\n"
    )


def _rows(description: MatcherDescription, record: TrainingRecord) -> dict[str, str]:
    """Everything that a version was made from, by name."""
    student, training = description.student, description.training
    decoding = ", ".join(f"{name} {value}" for name, value in asdict(description.decoding).items())
    return {
        "task": "semantic correspondence",
        "base_uri": student.base,
        "base_sha256": description.base_hash,
        "blocks": str(student.layers or "all"),
        "rank": str(student.rank),
        "adapted from block": str(student.first_block),
        "size": str(description.preparation.size),
        "normalisation": description.preparation.normalisation,
        "fit": description.preparation.fit,
        "decoding": decoding,
        "teachers": ", ".join(training.get("teachers", {})),
        **_weights(training.get("teachers", {})),
        "distillation": _values(training.get("distillation", {})),
        "multi_view": _values(training.get("multi_view", {})),
        "training.step": str(training.get("step", "")),
        "training.run": record.run,
        "features_digest": str(training.get("features", "")),
    }


def _weights(teachers: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each teacher's weights."""
    return {f"teacher {name}": str(each.get("weights", "")) for name, each in teachers.items()}


def _values(config: Mapping[str, Any]) -> str:
    """A loss's settings in a line; nothing for a loss without weight."""
    return ", ".join(f"{name} {value}" for name, value in config.items()) if config.get("weight") else ""
