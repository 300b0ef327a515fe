"""What came in, as figures and as one self-contained HTML page without scripts: people look before they train."""

import base64
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from d2f_core.data.manifest import Manifest
from d2f_core.data.quarantine import DUPLICATE, QUARANTINE_NAME
from d2f_core.import_images.config import ImportImagesConfig
from d2f_core.import_images.parting import Parting
from d2f_core.model.caption_rules import CaptionRules
from d2f_core.storage import arrow_filesystem, join, read_bytes, retried, write_bytes

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN = 50
"""Images shown of each kind, and lines of the ledger."""
THUMBNAIL = 144
"""Stored long side in pixels: twice the displayed one, for high-density screens."""
CAPTIONS_AT_ONCE = 10_000
SIDES_PX = (0, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096)
"""Lower ends of the bars of short sides, in pixels."""
ASPECTS = (0.0, 0.4, 0.5, 0.62, 0.72, 0.88, 1.14, 1.4, 1.6, 2.0, 2.5)
"""Lower ends of the bars of width / height; 1 lies in the middle of its bar."""
LENGTHS = (0, 5, 10, 20, 30, 40, 50, 60, 75, 100, 150, 250)


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    image: str
    """A data URI."""
    note: str
    title: str
    """Where the image came from, and its caption."""


def write_report(config: ImportImagesConfig, everything: str, table: Manifest, parting: Parting) -> dict[str, Any]:
    """Write report.html and return the figures that it shows, as JSON values.

    Args:
        everything: URI of the table of all usable images.
    """
    lengths, most = caption_lengths(parting.rows["caption"].to_pylist(), config.base, config.captions)
    left_out = pq.read_table(pa.BufferReader(read_bytes(join(everything, QUARANTINE_NAME)))).to_pylist()
    summary = summarise(table, parting, lengths, most, left_out)
    page = render(config, summary, _shown(everything, table, parting), left_out[:SHOWN])
    write_bytes(join(config.output, "report.html"), page.encode())
    return summary


def caption_lengths(captions: Sequence[str], base: str, rules: CaptionRules) -> tuple[np.ndarray, int]:
    """Length of each caption, and the most that the base's text encoder reads.

    Returns:
        Tokens without those of beginning and end, and their number; without a base words, and 0.
    """
    if not base:
        return np.array([len(caption.split()) for caption in captions]), 0
    from d2f_core.model.base import describe_base
    from d2f_core.model.text_encoder import describe_text_encoder

    described = describe_text_encoder(describe_base(base).read_captions(rules))
    tokenizer = described.tokenizers[0]
    counts: list[int] = []
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        some = list(captions[start : start + CAPTIONS_AT_ONCE])
        counts += map(len, tokenizer(some, add_special_tokens=False)["input_ids"])
    return np.array(counts), described.read_at_most


def summarise(
    table: Manifest, parting: Parting, lengths: np.ndarray, most: int, left_out: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of the page."""
    rows = parting.rows
    widths, heights = (rows[f"original_{side}"].to_numpy() for side in ("width", "height"))
    reasons = Counter[str]()
    for sample in left_out:
        reasons[str(sample["reason"]).partition(":")[0]] += sample["rows"]
    others = sum(len(group) - 1 for group in parting.alike)
    return {
        "read": table.counts["read"],
        "train": int(parting.chosen("train").sum()),
        "test": int(parting.chosen("test").sum()),
        "left_out": dict(reasons.most_common()),
        "equal": reasons.get(DUPLICATE, 0),
        "alike": {"clusters": len(parting.alike), "others": others, "dropped": int(parting.dropped.sum())},
        "sides": _bars(np.minimum(widths, heights), SIDES_PX),
        "aspects": _bars(widths / heights, ASPECTS),
        "captions": {
            "unit": "tokens" if most else "words",
            "read_at_most": most,
            "cut": float((lengths > most).mean()) if most else None,
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
            "lengths": _bars(lengths, LENGTHS),
        },
    }


def _bars(values: np.ndarray, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Counts by lower end; bars at both ends that are empty are left out."""
    counts = np.histogram(values, bins=[*edges, np.inf])[0]
    there = np.flatnonzero(counts)
    labels = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [f"from {edges[-1]:g}"]
    return [{"label": labels[n], "count": int(counts[n])} for n in range(there[0], there[-1] + 1)]


def _shown(everything: str, table: Manifest, parting: Parting) -> dict[str, list[list[Thumbnail]]]:
    """Thumbnails: rows of one, or of a cluster of images that look alike."""
    rows = parting.rows
    pixels = rows["original_width"].to_numpy().astype(np.int64) * rows["original_height"].to_numpy()
    sharp = rows["sharpness"].to_numpy()
    smallest, blurriest = (np.argsort(values, kind="stable")[:SHOWN].tolist() for values in (pixels, sharp))
    clusters, alike = [], 0
    for group in sorted(parting.alike, key=len, reverse=True):
        if alike < SHOWN:
            clusters.append(group[:6])
            alike += len(clusters[-1])
    wanted = {*smallest, *blurriest, *(row for group in clusters for row in group)}
    images = _thumbnails(everything, table, sorted(wanted))
    size: Callable[[int], str] = lambda row: f"{rows['original_width'][row]}x{rows['original_height'][row]}"  # noqa: E731

    def thumbnail(row: int, note: str) -> Thumbnail:
        return Thumbnail(image=images[row], note=note, title=f"{rows['source_uri'][row]}: {rows['caption'][row]}")

    return {
        "smallest": [[thumbnail(row, size(row))] for row in smallest],
        "blurriest": [[thumbnail(row, f"{sharp[row]:.0f}")] for row in blurriest],
        "alike": [[thumbnail(row, size(row)) for row in group] for group in clusters],
    }


def _thumbnails(everything: str, table: Manifest, wanted: Sequence[int]) -> dict[int, str]:
    """Data URIs by row; of the table no more is read than the row groups that hold these rows."""
    found, first = {}, 0
    for file in table.files:
        here = [row - first for row in wanted if first <= row < first + file.rows]
        if here:
            fs, path = arrow_filesystem(join(everything, file.path))
            with retried(f"open {file.path}", lambda: pq.ParquetFile(path, filesystem=fs)) as opened:  # noqa: B023
                for row in here:
                    found[first + row] = _data_uri(_image_at(opened, row))
        first += file.rows
    return found


def _image_at(opened: pq.ParquetFile, row: int) -> bytes:
    for group in range(opened.metadata.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        if row < rows:
            return opened.read_row_group(group, columns=["image"])["image"][row].as_py()
        row -= rows
    raise IndexError(row)


def _data_uri(data: bytes) -> str:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"


def render(
    config: ImportImagesConfig,
    summary: Mapping[str, Any],
    shown: Mapping[str, Any],
    left_out: Sequence[Mapping[str, Any]],
) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(config=config, summary=summary, shown=shown, left_out=left_out)
