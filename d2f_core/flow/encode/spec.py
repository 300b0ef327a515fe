"""The differences between kinds of encode jobs, and everything that determines their tables. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pyarrow as pa

from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.aspect_buckets import Size, size_name
from d2f_core.data.manifest import TableFile
from d2f_core.data.schema import array_field
from d2f_core.flow.encode.config import EncodeConfig, EncodeSettings
from d2f_core.model.caption_rules import read_rules


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of each sample that an actor encodes."""

    name: str
    """Input column of the picture: uint8 [height, width, 3], or float32 [height, width] in [-1, 1], which is encoded as
    three equal channels."""
    dtype: Literal["uint8", "float32"]
    mean: str
    """Output column of the scaled latent's mean."""
    std: str | None
    """Output column of the scaled latent's standard deviation; None: not stored."""
    flipped: tuple[str, str] | None = None
    """Output columns of mean and standard deviation of the picture mirrored left to right; None: not encoded."""

    @property
    def encoded(self) -> tuple[str, ...]:
        """All its output columns."""
        return tuple(name for name in (self.mean, self.std, *(self.flipped or ())) if name is not None)


@dataclass(frozen=True, kw_only=True)
class EncodeKind:
    """A kind of samples, in which encode jobs differ. The functions must be defined at the top level of a module, so
    that every node can import them by name, and their modules must not import torch."""

    schema: Callable[[tuple[int, int, int]], pa.Schema]
    """Shape of the latents -> schema of the table."""
    pictures: tuple[Picture, ...]
    identify: Callable[[Any], str]
    """Sample -> sample id; raises BadImageError when the sample lacks a part."""
    prepare: Callable[[Any, "EncodeSpec"], dict[str, Any]]
    """Sample -> its pictures and the columns that are known before encoding, except `sample_id`, `source_uri` and
    `bucket`; raises BadImageError when the sample is unusable."""
    grows: bool = False
    """Whether the id is a hash of all parts of a sample (see `TableSpec.grows`)."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """Values that the kind adds to the table's fingerprint."""
    captioned: bool = False
    """Whether its samples have captions that a model reads."""


@dataclass(frozen=True, kw_only=True)
class EncodeSpec(TableSpec):
    """Specification of a latent table. Of the base model only the encoders matter, which are in the fingerprint."""

    NAME: ClassVar[str] = "encode_latents"
    KIND: ClassVar[str] = "latents"
    UNIT: ClassVar[str] = "images"
    FREE: ClassVar[frozenset[str]] = frozenset({"base", "base_hash"})

    config: EncodeSettings
    kind: EncodeKind
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""
    size: Size | None = None
    """Width and height of the pictures; None: squares of the resolution."""

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(map(size_name, self.config.sizes))

    def table_of(self, row: Mapping[str, Any]) -> str:
        height, _, width = row["bucket"].partition("x")
        return f"{width}x{height}" if self.config.sizes else ""

    def of_table(self, name: str) -> "EncodeSpec":
        return self.of_size(dict(zip(self.tables, self.config.sizes, strict=True))[name]) if name else self

    def of_size(self, size: Size) -> "EncodeSpec":
        """The specification for pictures of a width and height in pixels."""
        channels, unit = self.latent_shape[0], self.pixels_per_latent
        return replace(self, size=size, latent_shape=(channels, size[1] // unit, size[0] // unit))

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of a latent's side."""
        return (self.size or (self.config.resolution,) * 2)[1] // self.latent_shape[1]

    def prepared_schema(self) -> pa.Schema:
        """The table's columns that are known before encoding, and the pictures."""
        encoded = {name for picture in self.kind.pictures for name in picture.encoded}
        fields = [column for column in self.kind.schema(self.latent_shape) if column.name not in encoded]
        width, height = self.size or (self.config.resolution,) * 2
        for picture in self.kind.pictures:
            shape = (height, width, 3) if picture.dtype == "uint8" else (height, width)
            fields.append(array_field(picture.name, picture.dtype, shape))
        return pa.schema(fields)

    def further_counts(self, files: Sequence[TableFile]) -> dict[str, int]:
        """How many captions are longer than the text encoder reads, and by how much; nothing if none is."""
        if not self.kind.captioned:
            return {}
        from d2f_core.flow.long_captions import cut_captions

        return cut_captions(self.config.output, files, self.config.base, read_rules(self.fingerprint))

    def identify(self, sample: Any) -> str:
        return self.kind.identify(sample)

    @property
    def grows(self) -> bool:
        return self.kind.grows and not self.tables

    @property
    def max_removed_share(self) -> float:
        return self.config.max_removed_share if isinstance(self.config, EncodeConfig) else super().max_removed_share

    def prepare(self, sample: Any) -> dict[str, Any]:
        size = self.config.resolution
        return {"bucket": f"{size}x{size}", **self.kind.prepare(sample, self)}
