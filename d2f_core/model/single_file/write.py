"""A model as one safetensors file in Stable Diffusion's original layout, which ComfyUI, Forge, SwarmUI and A1111 open.

Tensors are read, cast and written one by one, so that memory does not grow with the model.
"""

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from d2f_core import storage
from d2f_core.model.sampling_metadata import sampling_metadata
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.prediction import prediction_metadata
from d2f_core.model.single_file.source import Source, open_source
from d2f_core.model.single_file.tensor_file import writing

SUFFIX = ".safetensors"
DtypeName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """The written file."""

    target: str
    family: str
    keys: int
    size: int
    """Bytes."""
    prediction: str
    """What its metadata tell programs: epsilon, v, v-zsnr, x0 or sd3."""


def write_checkpoint_file(
    model_uri: str,
    target: str,
    *,
    base_uri: str | None = None,
    base_prediction: str = "",
    dtype: DtypeName = "float16",
    title: str = "",
) -> CheckpointFile:
    """Write a base model or a trained one, a LoRA merged, with its text encoders and autoencoder.

    Args:
        model_uri: a model's directory, s3:// prefix, or whatever names a base model.
        target: a local path or s3:// key that ends in .safetensors; a file there is replaced when all is written.
        base_uri: the base's present location, if it has moved.
        base_prediction: what an unchanged base predicts, if its scheduler config says it wrongly.
        dtype: of the weights.
        title: the model's name in programs; empty: the file's name.

    Raises:
        LayoutError: the layout or the dtype, or the programs that open it, cannot hold the model.
        ArtifactError, BaseModelError: the model or its base cannot be used.
    """
    if not target.endswith(SUFFIX):
        raise LayoutError(f"target={target!r} must end in {SUFFIX}: that is how programs find checkpoints.")
    try:
        source = open_source(model_uri, base_uri, base_prediction)
        told = prediction_metadata(source.prediction, source.family, source.size, title or Path(target).stem)
        metadata = {"format": "pt", **told, **sampling_metadata(source.description)}
        with _made(target) as file:
            keys = _write(file, source, metadata, dtype)
            size = file.stat().st_size
    except LayoutError as error:
        raise LayoutError(f"{model_uri!r}: {error}") from None
    name = told["modelspec.prediction_type"]
    return CheckpointFile(target=target, family=source.family.title, keys=keys, size=size, prediction=name)


@contextmanager
def _made(target: str) -> Iterator[Path]:
    """A local file to write, which is put to `target` at the end of the context; on errors nothing is."""
    local = None if storage.is_s3(target) else Path(storage.filesystem(target)[1])
    if local:
        local.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local and local.parent, prefix=".") as directory:
        file = Path(directory, "checkpoint")
        yield file
        if local:
            file.replace(local)
            return
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            with memoryview(mapped) as view:  # sent in small parts
                storage.write_bytes(target, view)


def _write(file: Path, source: Source, metadata: dict[str, str], dtype: DtypeName) -> int:
    """Write all tensors; returns their number."""
    buffers = {key: tensor for part in source.parts for key, tensor in part.buffers.items()}
    buffers |= {name: torch.empty(0) for name in source.prediction.markers}
    shapes = {key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in buffers.items()}
    shapes |= {entry.key: (dtype, tuple(part.key_shape(entry))) for part in source.parts for entry in part.entries}
    with writing(file, shapes, metadata) as writer:
        for key, tensor in buffers.items():
            writer.write(key, tensor)
        for part in source.parts:
            read = source.reads[part.directory]
            for entry in part.entries:
                writer.write(entry.key, _cast(entry.join([read(name) for name in entry.names]), dtype, entry.key))
    return len(shapes)


def _cast(tensor: Tensor, dtype: DtypeName, key: str) -> Tensor:
    made = tensor.to(getattr(torch, dtype))
    if not torch.stack(torch.aminmax(made)).isfinite().all():  # which keep a NaN, ten times as fast as all of `made`
        largest = float(tensor.abs().max())
        raise LayoutError(
            f"{key!r} has the magnitude {largest:g}, which {dtype} cannot hold. Write bfloat16 or float32, and check "
            "the training if it is not a number."
        )
    return made
