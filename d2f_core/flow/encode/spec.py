"""The differences between kinds of encode jobs, and everything that determines their tables. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.manifest import TableFile
from d2f_core.data.schema import array_field
from d2f_core.flow.encode.config import EncodeSettings
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

    def prepared_schema(self) -> pa.Schema:
        """The table's columns that are known before encoding, and the pictures."""
        encoded = {name for picture in self.kind.pictures for name in (picture.mean, picture.std)}
        fields = [column for column in self.kind.schema(self.latent_shape) if column.name not in encoded]
        size = self.config.resolution
        for picture in self.kind.pictures:
            shape = (size, size, 3) if picture.dtype == "uint8" else (size, size)
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

    def prepare(self, sample: Any) -> dict[str, Any]:
        size = self.config.resolution
        return {"bucket": f"{size}x{size}", **self.kind.prepare(sample, self)}
