"""Small captioned pictures, and the same ones written as each kind of source."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from d2f_core.storage import join, write_bytes

Picture = tuple[str, bytes, str]
"""File name, file contents, caption."""


def file_bytes(pixels: np.ndarray, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file of uint8 [height, width, 3]."""
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, kind)
    return sink.getvalue()


def pixels(number: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(count: int, *, first: int = 0) -> list[Picture]:
    """Different pictures in all three formats, named so that names sort as numbers do."""
    kinds = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))
    chosen = [(number, *kinds[number % 3]) for number in range(first, first + count)]
    return [(f"{n:03d}.{suffix}", file_bytes(pixels(n), kind), f"picture number {n}") for n, kind, suffix in chosen]


def write_folder(uri: str, items: Sequence[Picture], *, table: str | None = None) -> str:
    """Images with a text file beside each, or with one caption table of the given name."""
    for name, image, caption in items:
        write_bytes(join(uri, name), image)
        if table is None:
            write_bytes(join(uri, name.rpartition(".")[0] + ".txt"), caption.encode())
    if table is not None:
        lines = [json.dumps({"file_name": name, "text": caption}) for name, _, caption in items]
        write_bytes(join(uri, table), "\n".join(lines).encode())
    return uri


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def write_tars(uri: str, items: Sequence[Picture], *, json_captions: bool = False, per_tar: int = 5) -> str:
    for start in range(0, len(items), per_tar):
        members = {}
        for name, image, caption in items[start : start + per_tar]:
            stem = name.rpartition(".")[0]
            members[name] = image
            if json_captions:
                members[f"{stem}.json"] = json.dumps({"caption": caption, "id": 7}).encode()
            else:
                members[f"{stem}.txt"] = caption.encode()
        write_bytes(join(uri, f"shard-{start // per_tar:04d}.tar"), tar_bytes(members))
    return uri


def write_parquet(uri: str, items: Sequence[Picture], *, struct: bool = False, per_group: int = 4) -> str:
    images = [{"bytes": image, "path": name} if struct else image for name, image, _ in items]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({"image": pa.array(images, kind), "text": [caption for *_, caption in items]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=per_group)
    write_bytes(join(uri, "data/train-00000.parquet"), sink.getvalue())
    return uri
