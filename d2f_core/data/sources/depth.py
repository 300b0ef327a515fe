"""Images with depth: this project's depth tables, and webdataset tars of data sets such as Hypersim and Virtual KITTI.

Members of a tar under one key, such as `0007`:

    0007.png  .jpg  .jpeg  .webp         the image; or 0007.rgb.png, 0007.image.jpg and so on
    0007.depth.npy                       floats [height, width] in metres
    0007.depth.png                       16-bit grey, `metres_per_level` each; 0 and 65535 are no depth
    0007.mask.png                        optional; where it is 0, the depth does not count
    0007.latent.npy                      floats [channels, h, w]: the image's latent, scaled, if `latents`
    0007.depth_latent.npy                that of the depth picture

Virtual KITTI 2 has centimetres (`metres_per_level=0.01`, the default) along the optical axis, and 65535 for the sky;
its users leave out what is beyond 80 m (`max_depth=80`). Hypersim has metres to the camera's centre instead: with
`distances="radial"` they are converted, with its focal length of 886.81 pixels for images 1024 pixels wide.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from d2f_core.data.depth import BadDepthError, planar_depth, size_text
from d2f_core.data.depth_files import MAX_DEPTH_BYTES, decode_depth, decode_depth_png, decode_mask
from d2f_core.data.image_headers import MAX_IMAGE_BYTES, PNG, too_large
from d2f_core.data.sources.config import DepthSource
from d2f_core.data.sources.listing import Sizes, SourcePlan, plan_source
from d2f_core.data.sources.parquet_rows import DamagedFileError, RowRun, check_bytes_column, plan_rows
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, PACKED_SUFFIXES, Sample, Shard, SourceError, SourceKind
from d2f_core.data.sources.tar import CLIMBS, climbs, is_tar, plan_packed
from d2f_core.data.sources.tar_archive import DamagedArchiveError, Members, Sibling, read_tar, siblings

MEMBERS = {
    "image": tuple(f"{stem}{suffix}" for stem in ("", ".rgb", ".image") for suffix in ALL_IMAGE_SUFFIXES),
    "depth": (".depth.npy", ".depth.png"),
    "mask": (".mask.png",),
    "latent": (".latent.npy",),
    "depth_latent": (".depth_latent.npy",),
}
"""File extensions of each part of a sample; if several are present, the first counts."""
TABLE_FIX = "Depth tables are written by `python -m pipelines.make_dataset depth`."


@dataclass(frozen=True, kw_only=True)
class DepthSample(Sample):
    """One image with its depth as stored in the source: undecoded and unchecked, without a caption."""

    caption: str | None = None
    depth: bytes | None = None
    """Bytes of a .npy or .png file."""
    mask: bytes | None = None
    """Bytes of a .png file."""
    latent: bytes | None = None
    """`latent` and `depth_latent` are the bytes of .npy files."""
    depth_latent: bytes | None = None


def read_depth(sample: DepthSample, source: DepthSource, max_pixels: int) -> np.ndarray | None:
    """Float32 [height, width]: metres along the optical axis, NaN where there is no depth; None without a depth file.

    Raises:
        BadDepthError: `mask_size` when mask and depth differ in size; and those of `depth_files`.
    """
    if sample.depth is None:
        return None
    if sample.depth.startswith(PNG):
        depth = decode_depth_png(sample.depth, source.metres_per_level, max_pixels)
    else:
        depth = decode_depth(sample.depth, max_pixels)
    if source.distances == "radial":
        depth = planar_depth(depth, source.focal * depth.shape[1])
    if source.max_depth is not None:
        depth = np.where(depth <= source.max_depth, depth, np.float32(np.nan))
    if sample.mask is not None:
        mask = decode_mask(sample.mask, max_pixels)
        if mask.shape != depth.shape:
            raise BadDepthError(f"mask_size: the mask is {size_text(mask)} px, the depth {size_text(depth)}")
        depth = np.where(mask, depth, np.float32(np.nan))
    return depth


def read_valid(sample: DepthSample, source: DepthSource, max_pixels: int) -> np.ndarray | None:
    """Bool [height, width]: where the depth is valid, by depth and mask, or by the mask alone; None when both are
    missing.

    Raises:
        BadDepthError: as `read_depth`.
    """
    depth = read_depth(sample, source, max_pixels)
    if depth is not None:
        return np.isfinite(depth)
    return None if sample.mask is None else decode_mask(sample.mask, max_pixels)


def plan_depth(source: DepthSource, *, rows_per_shard: int = 256) -> SourcePlan:
    """List the source and cut it into shards of about `rows_per_shard` samples (a tar is always one shard).

    Raises:
        SourceError: the source is empty, mixes layouts, or lacks columns.
    """

    def cut(kind: SourceKind, sizes: Sizes) -> Collection[Shard]:
        if kind == "webdataset":
            found = siblings({uri: size for uri, size in sizes.items() if is_tar(uri)})
            packed = plan_packed(sizes) if source.kind == "auto" else []
            return [
                *(DepthTarShard(uri=uri, latents=source.latents, sibling=found[uri]) for uri in sorted(found)),
                *packed,
            ]
        if kind == "folder":
            raise SourceError(f"{source.uri!r} is a folder of images. Depth is read from tars and depth tables.")
        if source.latents:
            raise SourceError(f"{source.uri!r} is a depth table, which holds no latents. Leave out --source.latents.")
        return [DepthTableShard(run=run) for run in plan_rows(sizes, _columns, rows_per_shard)]

    def newly_listed(files: Collection[str]) -> bool:
        return source.kind == "auto" and any(file.lower().endswith(PACKED_SUFFIXES) for file in files)

    return plan_source(source.uri, source.kind, ("depth",), cut, split=source.split, newly_listed=newly_listed)


def _columns(uri: str, schema: pa.Schema) -> list[str]:
    for name in ("image", "depth"):
        check_bytes_column(uri, schema, name, name, TABLE_FIX)
    return ["image", "depth"]


@dataclass(frozen=True, kw_only=True)
class DepthTableShard:
    run: RowRun

    @property
    def num_rows(self) -> int:
        return self.run.num_rows

    def read(self) -> Iterator[DepthSample]:
        try:
            for uri, record in self.run.read():
                yield _row_sample(uri, record["image"], record["depth"])
        except DamagedFileError as error:
            yield DepthSample(source_uri=self.run.uri, image=None, problem=str(error), rows=error.rows)


def _row_sample(uri: str, image: bytes | None, depth: bytes | None) -> DepthSample:
    for name, value, most in (("image", image, MAX_IMAGE_BYTES), ("depth", depth, MAX_DEPTH_BYTES)):
        if value is None:
            return DepthSample(source_uri=uri, image=None, problem=f"no_{name}: null in the table")
        if len(value) > most:
            return DepthSample(source_uri=uri, image=None, problem=f"{too_large(len(value), most)} ({name})")
    return DepthSample(source_uri=uri, image=image, depth=depth)


@dataclass(frozen=True, kw_only=True)
class DepthTarShard:
    uri: str
    latents: bool
    sibling: Sibling | None = None

    @property
    def num_rows(self) -> None:
        return None

    @property
    def needed(self) -> tuple[str, str]:
        """Parts that a sample must have."""
        return ("latent", "depth_latent") if self.latents else ("image", "depth")

    @property
    def wanted(self) -> tuple[str, ...]:
        """Parts that are read if present."""
        return tuple(dict.fromkeys((*self.needed, "depth", "mask")))

    def read(self) -> Iterator[DepthSample]:
        try:
            for key, members in read_tar(self.uri, self._most_bytes, self.sibling):
                yield self._sample(key, members)
        except DamagedArchiveError as error:
            yield DepthSample(source_uri=self.uri, image=None, problem=str(error), rows=error.rows)

    def _most_bytes(self, extension: str) -> int | None:
        part = next((part for part in self.wanted if extension in MEMBERS[part]), None)
        return MAX_IMAGE_BYTES if part == "image" else MAX_DEPTH_BYTES if part else None

    def _sample(self, key: str, members: Members) -> DepthSample:
        names = {part: next((name for name in MEMBERS[part] if name in members), None) for part in self.wanted}
        contents = {part: members[name] for part, name in names.items() if name}
        problems = [CLIMBS] if climbs(key) else []
        there = ", ".join(sorted(members))
        problems += [f"no_{part}: only {there} under this key" for part in self.needed if part not in contents]
        problems += [f"{reason} ({part})" for part, reason in contents.items() if isinstance(reason, str)]
        place = f"{self.uri}#{key}{names.get('image') or ''}"
        if problems:
            return DepthSample(source_uri=place, image=None, problem=problems[0])
        parts: dict[str, Any] = {"image": None, **contents}
        return DepthSample(source_uri=place, **parts)
