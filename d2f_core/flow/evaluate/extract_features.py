"""Extracts features as a Ray Data job: from tables of images or generations to tables of features.

    OUTPUT/part-*.parquet    row, sample_id, steps, features, caption_score, clip_features; one per file of the source
    OUTPUT/manifest.json     written last

Features are all of the network's, in float32; they are projected when they are measured (`projection.project`).
`row` is the image's place in its set: the same for the same prompt in generations of one prompt file. A part is done
when its file exists, so a killed job resumes with the missing parts.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from d2f_core.batch.actor_pool import map_items
from d2f_core.data.image_decoding import to_rgb
from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    TableFile,
    describe_file,
    manifest_exists,
    read_manifest,
    write_manifest,
    write_part,
)
from d2f_core.device import reserved_device
from d2f_core.flow.evaluate.config import ScoreConfig
from d2f_core.flow.evaluate.feature_networks import CaptionScorer, FeatureError, load_features
from d2f_core.flow.evaluate.feature_table import feature_schema
from d2f_core.identity import canonical_json
from d2f_core.progress import Progress
from d2f_core.storage import join, list_names, read_bytes

KIND = "features"
READ_THREADS = 8


def extract_features(
    tables: Mapping[str, str],
    config: ScoreConfig,
    fingerprint: dict[str, Any],
    most_images: Mapping[str, int] | None = None,
) -> dict[str, Manifest]:
    """Extract the features of every image of several tables in one job; needs a running Ray. Existing parts are kept.

    Args:
        tables: source URI (images, or generations) by output URI.
        fingerprint: hashes of the networks, which must be equal for features to be comparable.
        most_images: of which outputs so many images are enough: those of files that are chosen at random.

    Returns:
        The feature tables by output URI.

    Raises:
        ValueError: an image cannot be decoded, or an output belongs to other images or networks.
    """
    most = most_images or {}
    items = {
        output: _items(source, output, most.get(output))
        for output, source in tables.items()
        if not manifest_exists(output)
    }
    missing = []
    for output, each in items.items():
        there = set(list_names(output))
        missing += [item for item in each if _part_name(item["part"]) not in there]
    parts = sum(len(each) for each in items.values())
    progress = Progress("score", parts, "parts", done=parts - len(missing))
    for _ in _run(config, missing) if missing else ():
        progress.advance(1)
    return {output: _finish(source, output, items.get(output, []), fingerprint) for output, source in tables.items()}


def _items(source: str, output: str, most: int | None) -> list[dict[str, Any]]:
    """One unit of work per file of the source, or of as many of its files as hold `most` images."""
    table, items, first = read_manifest(source), [], 0
    turns, chosen = _turns(table), _chosen_files(table, most)
    for number, file in enumerate(table.files):
        place = {"source": source, "kind": table.kind, "path": file.path, "output": output}
        if number in chosen:
            items.append({**place, "part": number, "first": first})
        first += file.rows // turns
    return items


def _chosen_files(table: Manifest, most: int | None) -> set[int]:
    if most is None:
        return set(range(len(table.files)))
    chosen, rows = set[int](), 0
    for number in np.random.Generator(np.random.Philox(0)).permutation(len(table.files)).tolist():
        if rows >= most:
            break
        chosen.add(number)
        rows += table.files[number].rows
    return chosen


def _turns(table: Manifest) -> int:
    """Images per prompt: in a generation, one for each number of steps."""
    return len(table.fingerprint["steps"]) if table.kind == "generations" else 1


def _finish(source: str, output: str, items: list[dict[str, Any]], fingerprint: dict[str, Any]) -> Manifest:
    """Write the finished table's manifest, or check and return the one of an earlier run."""
    table = read_manifest(source)
    identity = {**fingerprint, "source": table.digest}
    if manifest_exists(output):
        manifest = read_manifest(output)
        if manifest.fingerprint != identity:
            raise ManifestError(f"{output!r} holds features of other images or networks. Give another output.")
        return manifest
    with ThreadPoolExecutor(READ_THREADS) as pool:
        files = tuple(pool.map(lambda item: _describe(output, _part_name(item["part"])), items))
    rows = sum(file.rows for file in files)
    counts = {"images": rows, "failed": table.num_rows - rows, "set": table.num_rows // _turns(table)}
    inputs = {"source": source, "kind": table.kind}
    manifest = Manifest(kind=KIND, files=files, fingerprint=identity, inputs=inputs, counts=counts)
    write_manifest(output, manifest)
    return manifest


def _part_name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _run(config: ScoreConfig, items: list[dict[str, Any]]) -> Iterator[Any]:
    return map_items(items, FeatureExtractor, (config,), config, node_wait_seconds=None)


class FeatureExtractor:
    """Ray Data actor: takes one file of the source, writes one part of the features."""

    def __init__(self, config: ScoreConfig) -> None:
        device = reserved_device()
        # Set even for a single actor: with another number of threads sums come out in another order.
        torch.set_num_threads(config.cpus_per_actor)
        # TF32 keeps three digits of a convolution's factors: features of a GPU would differ from those of a CPU.
        torch.backends.cudnn.allow_tf32 = False
        self._batch = config.batch_size
        self._features = load_features(config.features, resize=config.resize, device=device)
        self._scorer = CaptionScorer(config.clip, device) if config.clip else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        item = {name: values[0] for name, values in batch.items()}
        data = pa.BufferReader(read_bytes(join(str(item["source"]), str(item["path"]))))
        rows = (_image_rows if item["kind"] == "images" else _generation_rows)(data, int(item["first"]))
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for start in range(0, len(rows), self._batch):
                some = rows[start : start + self._batch]
                self._score(some, list(pool.map(_pixels, some)))
        columns = feature_schema(self._features.width)
        made = [{name: row[name] for name in columns.names} for row in rows]
        write_part(str(item["output"]), _part_name(int(item["part"])), pa.Table.from_pylist(made, schema=columns))
        return {"part": [int(item["part"])]}

    def _score(self, rows: list[dict[str, Any]], pixels: list[np.ndarray]) -> None:
        """Add features (and what CLIP says) to rows; images of one size share a forward pass."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for number, each in enumerate(pixels):
            sizes.setdefault(each.shape, []).append(number)
        for numbers in sizes.values():
            images = np.stack([pixels[number] for number in numbers])
            told = self._scorer(images, [rows[number]["caption"] for number in numbers]) if self._scorer else None
            for place, (number, found) in enumerate(zip(numbers, self._features(images), strict=True)):
                rows[number]["features"] = found
                rows[number]["caption_score"] = None if told is None else float(told.scores[place])
                rows[number]["clip_features"] = None if told is None else told.features[place]


def _image_rows(data: pa.BufferReader, first: int) -> list[dict[str, Any]]:
    rows = pq.read_table(data, columns=["sample_id", "caption", "image"]).to_pylist()
    return [{**row, "row": first + number, "steps": 0} for number, row in enumerate(rows)]


def _generation_rows(data: pa.BufferReader, first: int) -> list[dict[str, Any]]:
    """The rows of a generation with an image; failed rows keep their place in the numbering."""
    seen: dict[int, int] = {}
    rows = []
    for row in pq.read_table(data, columns=["sample_id", "prompt", "steps", "image_uri"]).to_pylist():
        place = seen.get(row["steps"], 0)
        seen[row["steps"]] = place + 1
        if row["image_uri"] is not None:
            rows.append({**row, "row": first + place, "caption": row["prompt"]})
    return rows


def _pixels(row: dict[str, Any]) -> np.ndarray:
    """The row's decoded image, uint8 [h, w, 3]."""
    data = row["image"] if "image" in row else read_bytes(row["image_uri"])
    try:
        return np.asarray(to_rgb(Image.open(io.BytesIO(data))))
    except Exception as error:  # Pillow's decoders raise a dozen types on broken data; each means the same here
        raise FeatureError(
            f"the image of sample {row['sample_id']!r} cannot be decoded ({error}). Make it again."
        ) from None


def _describe(output: str, name: str) -> TableFile:
    return describe_file(name, read_bytes(join(output, name)))


def score_key(source: str, fingerprint: dict[str, Any]) -> str:
    """Short hash of a source table's content and the networks; part of a feature table's URI."""
    value = {"source": read_manifest(source).digest, **fingerprint}
    return hashlib.sha256(canonical_json(value)).hexdigest()[:12]
