"""The images and captions that a candidate's training held out, as the reference and the prompts of its evaluation."""

import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2f_core.data.manifest import Manifest, ManifestError, manifest_exists, read_manifest, write_manifest, write_part
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import IMAGE_SCHEMA
from d2f_core.data.table_reader import RowReader, read_columns
from d2f_core.evaluation.pins import registered_name
from d2f_core.flow.evaluate.config import AUTO, EvaluateConfig, EvaluateError
from d2f_core.flow.generate.prompts import SAMPLE_ID
from d2f_core.model.artifact import DESCRIPTION, read_description
from d2f_core.model.base import described_copy
from d2f_core.storage import join, write_bytes
from d2f_core.tracking import resolve_model

logger = logging.getLogger(__name__)

PROMPTS_NAME, REFERENCE = "prompts.parquet", "reference"
IMAGES = "images"
ROWS_AT_ONCE = 256


def filled(config: EvaluateConfig, candidate: str) -> EvaluateConfig:
    """The config with its empty inputs in place: the reference of held-out rows, the prompts of the reference's
    captions, the training's images. What has to be made for that is written at the output.

    Args:
        candidate: URI of the model without alias.

    Raises:
        EvaluateError: they are not given, and cannot be known from the candidate.
    """
    training = training_record(candidate)
    if not config.reference:
        config = replace(config, reference=_write_reference(join(config.output, REFERENCE), candidate, training))
    if not config.prompts:
        config = replace(config, prompts=_write_prompts(config))
    if config.training == AUTO:
        config = replace(config, training=_images_of(training) or "")
    return config


def training_record(uri: str) -> Mapping[str, Any]:
    """What a model says about its training; empty for a base model."""
    directory = described_copy(resolve_model(uri)).path
    return read_description(directory)["training"] if (directory / DESCRIPTION).is_file() else {}


def _latents(training: Mapping[str, Any]) -> Manifest | None:
    uri = str(training.get("latents") or "")
    try:
        return read_manifest(uri) if uri and manifest_exists(uri) else None
    except ManifestError as error:
        logger.warning("the latents of the candidate's training cannot be read: %s", error)
        return None


def _images_of(training: Mapping[str, Any]) -> str | None:
    """The image table from which the latents of a training were made; None if it is no such table, or gone."""
    latents = _latents(training)
    uri = str(latents.inputs.get("source") or "") if latents else ""
    if not uri or not manifest_exists(uri):
        return None
    return uri if read_manifest(uri).kind == IMAGES else None


def held_out_ids(training: Mapping[str, Any]) -> pa.ChunkedArray | None:
    """Sample ids of the rows that a training held out; None where they cannot be known."""
    latents, held = _latents(training), int(training.get("holdout_rows") or 0)
    if latents is None or not held:
        return None
    rows = SampleOrder(num_rows=latents.num_rows, holdout_rows=held).holdout()
    return RowReader(str(training["latents"]), latents, ("sample_id",)).read(rows).column("sample_id")


def _write_reference(place: str, candidate: str, training: Mapping[str, Any]) -> str:
    """An image table of the held-out rows at `place`, in their order."""
    if manifest_exists(place):
        return place
    images, ids = _images_of(training), held_out_ids(training)
    if images is None or ids is None:
        reason = "held out no rows, or does not say which" if ids is None else "was not on a table of images"
        raise EvaluateError(
            f"reference is empty, and the training of {registered_name(candidate) or candidate!r} {reason}. Give "
            "--reference a table of images that it has not seen."
        )
    manifest = read_manifest(images)
    there = read_columns(images, manifest, ("sample_id",)).column("sample_id")
    rows = pc.call_function("index_in", [ids], pc.SetLookupOptions(value_set=there))
    if rows.null_count:
        raise EvaluateError(
            f"reference is empty, and {rows.null_count} of {len(ids)} rows that the training held out are not in "
            f"{images!r}. Give --reference a table of images that it has not seen."
        )
    reader, files, places = RowReader(images, manifest, IMAGE_SCHEMA.names), [], rows.to_numpy()
    for start in range(0, len(places), ROWS_AT_ONCE):
        table = reader.read(places[start : start + ROWS_AT_ONCE].astype(np.int64))
        files.append(write_part(place, f"part-{len(files):05d}.parquet", table.cast(IMAGE_SCHEMA)))
    inputs = {"held_out_of": images, "digest": manifest.digest}
    write_manifest(
        place, Manifest(kind=IMAGES, files=tuple(files), fingerprint=dict(manifest.fingerprint), inputs=inputs)
    )
    logger.info("the reference is the %d images of %s that the training held out", len(places), images)
    return place


def _write_prompts(config: EvaluateConfig) -> str:
    """The reference's captions as a prompt file at the output, with the images' sample ids."""
    place, manifest = join(config.output, PROMPTS_NAME), read_manifest(config.reference)
    if manifest.kind != IMAGES:
        raise EvaluateError(
            f"prompts is empty, and reference={config.reference!r} is a table of {manifest.kind}, without captions of "
            "its own. Give --prompts a prompt file."
        )
    rows = read_columns(config.reference, manifest, ("sample_id", "caption")).rename_columns(["sample_id", "prompt"])
    ids = rows.column("sample_id")
    pattern = pc.MatchSubstringOptions(f"^{SAMPLE_ID.pattern}$")
    fitting = pc.call_function("match_substring_regex", [ids], pattern)
    if (
        fitting.null_count or not all(fitting.to_numpy()) or len(ids.unique()) < len(ids)
    ):  # then each prompt is named by its row
        rows = rows.select(["prompt"])
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    write_bytes(place, sink.getvalue())
    return place
