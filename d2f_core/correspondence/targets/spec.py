"""Everything that determines a table of pairs. Imports no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from d2f_core.batch.table_spec import TableSpec
from d2f_core.correspondence.targets.config import EmbedPairsConfig
from d2f_core.correspondence.targets.index import image_index
from d2f_core.correspondence.targets.source import IdPair
from d2f_core.data.errors import BadSampleError
from d2f_core.data.manifest import rows_per_group
from d2f_core.data.schema import array_field, array_kind, is_array

PAIRS = "pairs"
"""Kind of the table."""
TEXTS = ("sample_id", "source_uri", "source_image_id", "target_image_id")
SIDES, WAYS = ("source", "target"), ("forward", "backward")
PIXELS = tuple(f"{side}_pixels" for side in SIDES)


def target_fields(way: str, tokens: int, kept: int, probabilities: str, *, cycle: bool) -> list[pa.Field]:
    """The columns of the targets from source to target (`forward`) or from target to source (`backward`)."""
    fields = [
        array_field(f"{way}_indices", "uint16", (tokens, kept)),
        array_field(f"{way}_probabilities", probabilities, (tokens, kept)),
        array_field(f"{way}_dropped", "float32", (tokens,)),
    ]
    return [*fields, array_field(f"{way}_weights", "float32", (tokens,))] if cycle else fields


def row_bytes(fields: Sequence[pa.Field]) -> int:
    """Bytes of a row's array columns."""
    return sum(field.type.byte_width for field in fields if is_array(field) and array_kind(field))


@dataclass(frozen=True, kw_only=True)
class PairsSpec(TableSpec):
    """Specification of a table of pairs: one row per pair of images, whichever way round."""

    NAME: ClassVar[str] = "embed_pairs"
    KIND: ClassVar[str] = PAIRS
    UNIT: ClassVar[str] = "pairs"
    FREE: ClassVar[frozenset[str]] = frozenset({"features", "source"})
    """Where the tables are: their digests decide, and a table that was moved is the same. Of its rows only `source_uri`
    says where the pairs were read."""

    config: EmbedPairsConfig
    size: int
    """Height and width of the stored images in pixels."""

    @property
    def grid(self) -> tuple[int, int]:
        """Of the student's tokens."""
        side = self.size // self.config.patch
        return side, side

    def prepared_schema(self) -> pa.Schema:
        texts = [pa.field(name, pa.string(), nullable=False) for name in TEXTS]
        return pa.schema([*texts, *(pa.field(f"{side}_row", pa.int64(), nullable=False) for side in SIDES)])

    def schema(self) -> pa.Schema:
        """Of the table."""
        of, (height, width) = self.config.targets, self.grid
        texts = [pa.field(name, pa.string(), nullable=False) for name in TEXTS]
        pixels = [array_field(name, "uint8", (self.size, self.size, 3)) for name in PIXELS]
        targets = [
            field
            for way in WAYS
            for field in target_fields(way, height * width, of.kept, of.probabilities, cycle=of.cycle)
        ]
        return pa.schema([*texts, *pixels, *targets])

    @property
    def row_group_rows(self) -> int:
        return rows_per_group(row_bytes(list(self.schema())))

    def identify(self, sample: IdPair) -> str:
        """The same for a pair and its reverse: a row holds the targets of both directions."""
        if sample.source == sample.target:
            raise BadSampleError(f"same_image: {sample.source} is paired with itself")
        return hashlib.sha256(":".join(sorted((sample.source, sample.target))).encode()).hexdigest()[:32]

    def prepare(self, sample: IdPair) -> dict[str, Any]:
        """Which images: their features are read where the targets are made."""
        index = image_index(self.config.features, self.inputs["features_digest"])
        ids = dict(zip(SIDES, (sample.source, sample.target), strict=True))
        return {f"{side}_row": index.by_id(name) for side, name in ids.items()} | {
            f"{side}_image_id": name for side, name in ids.items()
        }
