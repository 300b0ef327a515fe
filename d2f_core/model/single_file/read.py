"""A single-file checkpoint as a base model: converted once into a directory in diffusers' layout, in the cache.

The directory is named by the hashes of the file's contents and of the configs. A directory `NAME.configs/` beside
`NAME.safetensors`, in diffusers' layout without weights, takes the place of the family's own configs: for networks of
another size, another scheduler or another tokenizer.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from d2f_core import storage
from d2f_core.cache import kept, make_room
from d2f_core.hashing import cache_root, file_sha256, hash_directory, one_at_a_time
from d2f_core.model.model_files import StoredObject
from d2f_core.model.single_file.convert import CONFIGS, convert
from d2f_core.model.single_file.keys import LayoutError

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
OWN_CONFIGS = ".configs"
"""After a file's name without its suffix: the directory of its own configs."""
VERSION = 1
"""Of the conversion; part of the names in the cache."""


def is_single_file(uri: str) -> bool:
    """Whether a base model's URI names a file, be it one that is refused."""
    return uri.endswith((SUFFIX, *PICKLES))


def converted(uri: str, *, cache_dir: Path | None = None) -> Path:
    """The directory in diffusers' layout of a single-file checkpoint, local or s3://; made when it is not there.

    Raises:
        LayoutError: the file is missing, damaged, or no whole checkpoint of a known family; the reason and the fix,
            which follow the file's name.
        UnreachableError: S3 stays away.
    """
    if uri.endswith(PICKLES):
        raise LayoutError(
            "is a pickle, which runs code when it is loaded. Give the model's .safetensors, or convert it on a machine "
            "that may run it."
        )
    root, there = cache_dir or cache_root(), stored_object(uri)
    root.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(there.digest_file), own_configs(uri) as configs:
        known = there.digest_file.read_text() if there.digest_file.is_file() else ""
        if known and (target := _place(root, known, configs)).is_dir():
            with one_at_a_time(target):
                if target.is_dir():
                    return kept(target, uri)
        with storage.local_file(uri, root) as file:
            digest = known or file_sha256(file)
            storage.write_bytes(str(there.digest_file), digest.encode())
            target = _place(root, digest, configs)
            with one_at_a_time(target):
                if not target.is_dir():
                    convert(file, target, configs)
                kept(target, uri)
    make_room(target.parent)
    return target


def stored_object(uri: str) -> StoredObject:
    """The file's present version, by which its hash is remembered."""
    if storage.is_s3(uri):
        for path, info in storage.list_tree(uri).items():
            if f"s3://{path}" == uri:
                return StoredObject(uri, int(info["size"]), str(info.get("ETag")))
    elif (file := Path(uri).absolute()).is_file():
        status = file.stat()
        return StoredObject(str(file), status.st_size, f"{status.st_mtime_ns} {status.st_ino}")
    raise LayoutError("does not exist. Check the path, or give a directory in diffusers' layout.")


@contextlib.contextmanager
def own_configs(uri: str) -> Iterator[Path | None]:
    """A local copy of the directory of configs beside a file; None if there is none."""
    place = uri.removesuffix(SUFFIX) + OWN_CONFIGS
    if not storage.is_s3(place):
        yield Path(place) if Path(place).is_dir() else None
    elif storage.list_names(place):
        with tempfile.TemporaryDirectory() as directory:
            yield storage.download_tree(place, Path(directory, "configs"))
    else:
        yield None


def _place(root: Path, digest: str, configs: Path | None) -> Path:
    name = sha256(f"{digest} {hash_directory(configs or CONFIGS)} {VERSION}".encode()).hexdigest()[:32]
    return root / "models" / name
