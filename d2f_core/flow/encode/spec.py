"""What differs between encode jobs, and everything that decides their tables. As light as the configs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.schema import array_field
from d2f_core.flow.encode.config import EncodeSettings


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What an actor encodes of each sample."""

    name: str
    """Column in which it comes: uint8 [height, width, 3], or float32 [height, width] in [-1, 1], which is encoded as
    three equal channels."""
    dtype: Literal["uint8", "float32"]
    mean: str
    """Column of the table for the scaled latent's mean."""
    std: str | None
    """Column for its deviation; None leaves it out."""


@dataclass(frozen=True, kw_only=True)
class EncodeKind:
    """What differs between jobs: the kind of their samples. The functions are a module's own, found by name on every
    node, and of modules as light as this one."""

    schema: Callable[[tuple[int, int, int]], pa.Schema]
    """Columns of the table, of the latents' shape."""
    pictures: tuple[Picture, ...]
    identify: Callable[[Any], str]
    """Sample -> sample id; raises BadImageError when it lacks a part."""
    prepare: Callable[[Any, "EncodeSpec"], dict[str, Any]]
    """Sample -> its pictures and the columns that are known before encoding, but for `sample_id`, `source_uri` and
    `bucket`; raises BadImageError when it cannot be used."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What it adds to the table's fingerprint."""


@dataclass(frozen=True, kw_only=True)
class EncodeSpec(TableSpec):
    """A table of latents. Of the base model only its encoders count, which are in the fingerprint."""

    NAME: ClassVar[str] = "encode_latents"
    KIND: ClassVar[str] = "latents"
    UNIT: ClassVar[str] = "images"
    FREE: ClassVar[frozenset[str]] = frozenset({"base", "base_hash"})

    config: EncodeSettings
    kind: EncodeKind
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""

    def prepared_schema(self) -> pa.Schema:
        """What is known of the table before encoding, and the pictures."""
        encoded = {name for picture in self.kind.pictures for name in (picture.mean, picture.std)}
        fields = [column for column in self.kind.schema(self.latent_shape) if column.name not in encoded]
        size = self.config.resolution
        for picture in self.kind.pictures:
            shape = (size, size, 3) if picture.dtype == "uint8" else (size, size)
            fields.append(array_field(picture.name, picture.dtype, shape))
        return pa.schema(fields)

    def identify(self, sample: Any) -> str:
        return self.kind.identify(sample)

    def prepare(self, sample: Any) -> dict[str, Any]:
        size = self.config.resolution
        return {"bucket": f"{size}x{size}", **self.kind.prepare(sample, self)}
