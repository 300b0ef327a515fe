"""The images of a table of features, found by id, by file or by bytes. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from d2f_core.data.errors import BadSampleError
from d2f_core.data.manifest import Manifest, ManifestError, read_manifest
from d2f_core.data.quarantine import DUPLICATE, read_quarantine
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.pair_sample import PairImage
from d2f_core.data.table_reader import read_columns

COLUMNS = ("sample_id", "source_uri", "category", "mesh")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageIndex:
    """What is known of each row; lists are in the table's order."""

    ids: list[str]
    categories: list[str]
    meshes: list[str]
    row_of: Mapping[str, int]
    """By id."""
    row_at: dict[str, int]
    """By file, or the hash of an image's bytes (`PairImage.key`), which joins as it is asked for."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Id or file of an image in the table's ledger -> why."""

    def by_id(self, name: str) -> int:
        """The row of an image.

        Raises:
            BadSampleError: `quarantined` or `not_embedded`.
        """
        if name in self.row_of:
            return self.row_of[name]
        raise self._missing(name)

    def find(self, image: PairImage) -> int:
        """The row of a pair's image: by its file, or else by its bytes.

        Raises:
            BadSampleError: as `by_id`.
        """
        if image.key not in self.row_at:
            if image.key in self.left_out:
                raise self._missing(image.key)
            self.row_at[image.key] = self.by_id(sample_id(image.read(), ""))
        return self.row_at[image.key]

    def _missing(self, name: str) -> BadSampleError:
        if name in self.left_out:
            return BadSampleError(f"quarantined: {name} has no features ({self.left_out[name]})")
        return BadSampleError(f"not_embedded: {name} is not in the table of features")


def planned_features(uri: str, digest: str) -> Manifest:
    """The manifest of the table of features.

    Raises:
        ManifestError: it is another table than that which the job was planned with.
    """
    manifest = read_manifest(uri)
    if manifest.digest != digest:
        raise ManifestError(
            f"{uri!r} has the digest {manifest.digest} here, and {digest} where the job started: it was replaced, or "
            "this node reads another place. Put the table back, or begin another output."
        )
    return manifest


@lru_cache(maxsize=2)
def image_index(uri: str, digest: str) -> ImageIndex:
    """The index of a table of features, read once in each process.

    Raises:
        ManifestError: see `planned_features`.
    """
    manifest = planned_features(uri, digest)
    table = read_columns(uri, manifest, COLUMNS)
    ids, places, categories, meshes = (table.column(name).to_pylist() for name in COLUMNS)
    rows = range(len(ids))
    # The content of a duplicate is in the table, under the name of another file.
    bad = [one for one in read_quarantine(uri) if one.code != DUPLICATE]
    return ImageIndex(
        ids=ids, categories=categories, meshes=meshes, row_of=dict(zip(ids, rows, strict=True)),
        row_at=dict(zip(places, rows, strict=True)),
        left_out={name: one.reason for one in bad for name in (one.source_uri, one.sample_id) if name},
    )  # fmt: skip
