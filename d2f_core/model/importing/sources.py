"""Where a checkpoint comes from: one file that is converted, or a directory of which the read files are taken.

Every source can be examined by configs and headers alone, and be written to a local directory.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from d2f_core import storage
from d2f_core.hashing import cache_root, file_sha256
from d2f_core.model.autoencoder import check_autoencoder
from d2f_core.model.base import BaseModel, describe_base, resolve_base
from d2f_core.model.denoiser import check_unet
from d2f_core.model.hub import is_hub_id
from d2f_core.model.importing.config import ImportCheckpointError
from d2f_core.model.importing.lora_keys import Shapes
from d2f_core.model.importing.lora_merge import MERGED, layer_shapes
from d2f_core.model.model_files import described_file
from d2f_core.model.safetensors_header import HeaderError
from d2f_core.model.single_file.convert import Checkpoint, convert, examine, write_configs
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.read import PICKLES, is_single_file, own_configs
from d2f_core.model.text_encoder import describe_text_encoder
from d2f_core.model.weight_files import NAMES, read_files, with_plain_names

INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a checkpoint before it is written."""

    prediction: str
    """As diffusers spells it."""
    told_by: str
    """What says so; empty: nothing does."""
    configs: Path
    """Directory with unet/config.json and vae/config.json, while the context lasts."""
    shapes: Shapes
    """Of the tensors that a LoRA may change."""


def is_file(uri: str) -> bool:
    """Whether a source is one file."""
    return is_single_file(uri) and not Path(uri).is_dir()


@contextmanager
def examined(uri: str) -> Iterator[Examined]:
    """Check a source by its configs and headers.

    Raises:
        BaseModelError, ImportCheckpointError: it is no whole checkpoint; the reason and the fix.
        UnreachableError: S3 or the hub stays away.
    """
    if not is_file(uri):
        base = describe_base(with_revision(uri))
        check_all(base)
        yield Examined(
            prediction=base.prediction_type,
            told_by="its scheduler config",
            configs=base.path,
            shapes=layer_shapes(base.path),
        )
        return
    with tempfile.TemporaryDirectory() as work, own_configs(uri) as configs, _named(uri):
        found = examine(described_file(uri, Path(work)), configs)
        write_configs(Path(work, "configs"), found, configs)
        base = resolve_base(str(Path(work, "configs")))
        own = bool(configs and (configs / "scheduler").is_dir())
        yield Examined(
            prediction=base.prediction_type,
            told_by=f"the scheduler beside {uri}" if own else found.prediction.told_by,
            configs=base.path,
            shapes=_shapes(found),
        )


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """Name the file in what its layout is refused for."""
    if uri.endswith(PICKLES):
        raise ImportCheckpointError(
            f"{uri!r} is a pickle, which runs code when it is loaded. Give the model's .safetensors, or convert it on "
            "a machine that may run it."
        )
    try:
        yield
    except (LayoutError, HeaderError) as error:
        raise ImportCheckpointError(f"{uri!r} {error}") from None


def _shapes(found: Checkpoint) -> dict[str, dict[str, torch.Size]]:
    parts = {part.directory: part for part in found.parts if part.directory in MERGED}
    return {name: {part.saved(each): shape for each, shape in part.shapes.items()} for name, part in parts.items()}


def check_all(base: BaseModel) -> None:
    """Compare the headers of all of a base's networks with their configs; raises BaseModelError."""
    check_unet(base)
    check_autoencoder(base)
    describe_text_encoder(base)


def write(uri: str, made: Path) -> dict[str, str]:
    """Write a source as the directory `made` in diffusers' layout.

    Returns:
        what identifies it, for the record: `source_hash` is the file's sha256, or the content hash of the directory's
        read files; `revision` the commit of a hub's model.

    Raises:
        BaseModelError, ImportCheckpointError: see `examined`.
        UnreachableError: S3 or the hub stays away.
    """
    if is_file(uri):
        with _named(uri), own_configs(uri) as configs, storage.local_file(uri, _room()) as file:
            convert(file, made, configs)
            return {"source_hash": file_sha256(file)}
    base = resolve_base(with_revision(uri))
    check_all(base)
    for name in (*read_files(base.path), INDEX):
        if (base.path / name).is_file():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path / name, made / name)
    for part, plain in NAMES.items():
        if (made / part).is_dir():
            with_plain_names(made / part, plain)
    commit = {"revision": base.path.name.rpartition("--")[2]} if _is_on_hub(uri) else {}
    return {"source_hash": base.read_hash, **commit}


def with_revision(uri: str) -> str:
    """A hub's model by its present revision, of which the read files are fetched alone."""
    return f"{uri}@main" if _is_on_hub(uri) and "@" not in uri else uri


def _is_on_hub(uri: str) -> bool:
    return is_hub_id(uri) and not storage.is_s3(uri) and not Path(uri).is_dir()


def _room() -> Path:
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    return root
