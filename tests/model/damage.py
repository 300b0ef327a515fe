"""Ways to damage an artifact, for tests: each writes what somebody with bad intentions, or a bad disk, would."""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2f_core.model.artifact import DESCRIPTION
from d2f_core.model.artifact_files import MAX_ENTRIES

Case = Callable[[Path, Path], object]
"""(artifact, canary): damages the artifact; code in it would create the canary."""
UNET = "unet/diffusion_pytorch_model.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"


class Creates:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def pickled(canary: Path) -> bytes:
    return pickle.dumps({"weight": Creates(canary)})


def script(canary: Path) -> bytes:
    return f"open({str(canary)!r}, 'w')\n".encode()


def zipped(canary: Path) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("../../climbed", "x")
        archive.writestr("__main__.py", script(canary))
    return sink.getvalue()


def file(name: str, content: bytes | Callable[[Path], bytes], instead: str = "") -> Case:
    """Write a file, and delete the one it stands in for."""

    def damage(artifact: Path, canary: Path) -> None:
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_bytes(content if isinstance(content, bytes) else content(canary))
        if instead:
            (artifact / instead).unlink()

    return damage


def fields(name: str, **changes: Any) -> Case:
    """Set fields of a JSON file; None of `diff2flow.json` deletes the field."""

    def damage(artifact: Path, _: Path) -> None:
        content = {**json.loads((artifact / name).read_text()), **changes}
        if name == DESCRIPTION:
            content = {key: value for key, value in content.items() if value is not None}
        (artifact / name).write_text(json.dumps(content))

    return damage


def link(name: str, target: str) -> Case:
    """Replace a file or directory by a symbolic link to what lies outside."""

    def damage(artifact: Path, _: Path) -> None:
        outside = artifact.parent / "outside"
        outside.mkdir()
        if (artifact / name).exists():
            shutil.move(artifact / name, outside / Path(target).name)
        (artifact / name).symlink_to(artifact.parent / target)

    return damage


def special(name: str, make: Callable[[Path], object]) -> Case:
    def damage(artifact: Path, _: Path) -> None:
        (artifact / name).unlink(missing_ok=True)
        make(artifact / name)

    return damage


def tensors(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Case:
    """Safetensors with this header (JSON, or bytes as they are) and this many bytes said to be header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return file(UNET, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def of_bytes(name: str, size: int) -> Case:
    """Grow a file without writing to the disk."""
    return lambda artifact, _: os.truncate(artifact / name, size)


def socket_at(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.open(place.parent, os.O_RDONLY)  # a socket's path is short
        try:
            server.bind(f"/proc/self/fd/{directory}/{place.name}")
        finally:
            os.close(directory)


def many(artifact: Path, _: Path) -> None:
    (artifact / "tokenizer").mkdir()
    for number in range(MAX_ENTRIES):
        (artifact / f"tokenizer/{number}.txt").touch()


def other_weights(artifact: Path, _: Path) -> None:
    """One bit of the weights."""
    content = bytearray((artifact / UNET).read_bytes())
    content[-1] ^= 1
    (artifact / UNET).write_bytes(content)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth
