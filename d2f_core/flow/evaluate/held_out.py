"""The images and captions that a candidate's training held out, as the reference and the prompts of its evaluation."""

import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2f_core.data.manifest import Manifest, ManifestError, manifest_exists, read_manifest, write_manifest, write_part
from d2f_core.data.schema import IMAGE_SCHEMA
from d2f_core.data.size_tables import held_out_rows
from d2f_core.data.table_history import read_version
from d2f_core.data.table_reader import RowReader, read_columns
from d2f_core.evaluation.pins import registered_name
from d2f_core.flow.evaluate.compared_models import carried
from d2f_core.flow.evaluate.config import AUTO, EvaluateConfig, EvaluateError
from d2f_core.flow.evaluate.feature_table import KnownRows
from d2f_core.flow.generate.prompts import SAMPLE_ID
from d2f_core.identity import canonical_json
from d2f_core.storage import file_exists, join, write_bytes

logger = logging.getLogger(__name__)

REFERENCE = "reference"
IMAGES = "images"
ROWS_AT_ONCE = 256


class Inputs(NamedTuple):
    """What an evaluation reads besides models."""

    config: EvaluateConfig
    """With nothing left empty that can be known."""
    known: KnownRows


def filled(config: EvaluateConfig, candidate: str, scratch: str = "") -> Inputs:
    """Put what is empty in place: the reference of held-out rows, the prompts of the reference's captions, the images
    of the training. What has to be made for that is written under a name of its content.

    Args:
        candidate: URI of the model without alias.
        scratch: where that is written; empty: the output.

    Raises:
        EvaluateError: they are not given, and cannot be known from the candidate.
    """
    training, place = carried(candidate, "training"), scratch or config.output
    held = held_out_ids(training)
    if not config.reference:
        _check_enough(held, config.fewest_images)
        config = replace(config, reference=_write_reference(place, candidate, training, held))
    if not config.prompts:
        config = replace(config, prompts=_write_prompts(place, config.reference))
    if config.training == AUTO:
        config = replace(config, training=_images_of(training) or "")
    return Inputs(config, _known_rows(config, held))


def _check_enough(held: pa.ChunkedArray | None, fewest: int) -> None:
    if held is not None and len(held) < fewest:
        raise EvaluateError(
            f"reference is empty, and the training held out {len(held)} rows, too few for a distance: it takes "
            f"{fewest} at least. Give --reference a table of images that it has not seen."
        )


def _known_rows(config: EvaluateConfig, held: pa.ChunkedArray | None) -> KnownRows:
    held_out = np.empty(0, object) if held is None else held.to_numpy()
    if not config.training or read_manifest(config.reference).kind != IMAGES:
        return KnownRows(held_out, np.empty(0, object))
    trained, reference = (
        read_columns(uri, read_manifest(uri), ("sample_id",)).column("sample_id").to_numpy()
        for uri in (config.training, config.reference)
    )
    return KnownRows(held_out, np.setdiff1d(np.intersect1d(reference, trained), held_out))


def _latents(training: Mapping[str, Any]) -> Manifest | None:
    """The table that a model was trained on, in that version; None if it is gone or another by now."""
    uri, digest = str(training.get("latents") or ""), training.get("latents_digest")
    if not uri or not manifest_exists(uri):
        return None
    try:
        found = read_version(uri, str(digest)) if digest else read_manifest(uri)
    except ManifestError as error:
        logger.warning("the latents of the candidate's training cannot be read: %s", error)
        return None
    if found is None:
        logger.warning("%s is not the table any more that the candidate was trained on", uri)
    return found


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
    rows = held_out_rows(latents, held)
    return RowReader(str(training["latents"]), latents, ("sample_id",)).read(rows).column("sample_id")


def _write_reference(place: str, candidate: str, training: Mapping[str, Any], ids: pa.ChunkedArray | None) -> str:
    """An image table of the held-out rows, in their order, under a name of its content."""
    images = _images_of(training)
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
    places = rows.to_numpy().astype(np.int64)
    inputs = {"held_out_of": images, "digest": manifest.digest, "rows": sha256(places.tobytes()).hexdigest()}
    target = join(place, f"{REFERENCE}-{sha256(canonical_json(inputs)).hexdigest()[:12]}")
    if manifest_exists(target):
        return target
    reader, files = RowReader(images, manifest, IMAGE_SCHEMA.names), []
    for start in range(0, len(places), ROWS_AT_ONCE):
        table = reader.read(places[start : start + ROWS_AT_ONCE])
        files.append(write_part(target, f"part-{len(files):05d}.parquet", table.cast(IMAGE_SCHEMA)))
    write_manifest(
        target, Manifest(kind=IMAGES, files=tuple(files), fingerprint=dict(manifest.fingerprint), inputs=inputs)
    )
    logger.info("the reference is the %d images of %s that the training held out", len(places), images)
    return target


def _write_prompts(place: str, reference: str) -> str:
    """The reference's captions as a prompt file, with the images' sample ids, under a name of its content."""
    manifest = read_manifest(reference)
    if manifest.kind != IMAGES:
        raise EvaluateError(
            f"prompts is empty, and reference={reference!r} is a table of {manifest.kind}, without captions. Give "
            "--prompts a prompt file."
        )
    target = join(place, f"prompts-{manifest.digest[:12]}.parquet")
    if file_exists(target):
        return target
    rows = read_columns(reference, manifest, ("sample_id", "caption")).rename_columns(["sample_id", "prompt"])
    ids = rows.column("sample_id")
    pattern = pc.MatchSubstringOptions(f"^{SAMPLE_ID.pattern}$")
    fitting = pc.call_function("match_substring_regex", [ids], pattern)
    if not all(fitting.to_numpy(zero_copy_only=False)) or len(ids.unique()) < len(ids):  # named by their rows
        rows = rows.select(["prompt"])
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    write_bytes(target, sink.getvalue())
    return target
