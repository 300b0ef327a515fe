"""The rows of a depth evaluation's sheet: image, truth and maps of a few images."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from d2f_core.data.depth_files import decode_depth
from d2f_core.data.image_decoding import to_rgb
from d2f_core.data.manifest import Manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.depth.errors import counted, square
from d2f_core.flow.depth.figures import ShownDepth
from d2f_core.flow.depth.map_index import MapIndex
from d2f_core.flow.depth.protocol import Protocol
from d2f_core.flow.depth.scorer import MapReader, fetch

Array = np.ndarray


def shown_maps(
    truth_uri: str, truth: Manifest, rows: Array, maps: Sequence[MapIndex], protocol: Protocol
) -> list[ShownDepth]:
    """The rows of the sheet.

    Args:
        rows: of the truth; each has a map by every predictor.
    """
    table = RowReader(truth_uri, truth, ("sample_id", "image", "depth")).read(rows)
    reader = MapReader(maps, protocol)
    places = reader.places(table["sample_id"].to_pylist())
    shown = []
    for row, of_image in zip(table.to_pylist(), places, strict=True):
        depth = decode_depth(row["depth"])
        found = reader.decode(fetch(of_image), depth.shape)
        predictions = {
            heading: values for heading, values in zip(_headings(maps), found, strict=True) if values is not None
        }
        shown.append(
            ShownDepth(
                image=_pixels(row["image"], depth.shape, protocol), truth=counted(depth, protocol),
                predictions=predictions,
            )
        )  # fmt: skip
    return shown


def _pixels(image: bytes, shape: tuple[int, int], protocol: Protocol) -> Array:
    """The image at the truth's size; its centre square where only that is compared."""
    whole = to_rgb(Image.open(io.BytesIO(image))).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return square(np.asarray(whole)) if protocol.square else np.asarray(whole)


def _headings(maps: Sequence[MapIndex]) -> list[str]:
    several = len({one.role for one in maps}) > 1
    return [
        f"{one.role}\n{one.evaluations}" if several else f"{one.evaluations} evaluation{'s' * (one.evaluations != 1)}"
        for one in maps
    ]
