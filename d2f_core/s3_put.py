"""Writes one object to S3: whole or in parts, and only if it does not exist, when that is asked for."""

import secrets

from d2f_core import s3
from d2f_core.s3_calls import retried

SEVERAL_PARTS = 100 * 2**20
"""Bytes from which s3fs uploads an object in parts."""
PART_BYTES = 6 * 2**20
"""Bytes of a view that are copied at a time with the interpreter's lock held, a few milliseconds, and of one part of
its upload. S3 takes 5 MiB at least, and 10,000 parts: 60 GB in one object."""


class _Parts:
    """Bytes that are cut into parts, of which only those under way are copied."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._content[part])


def put(uri: str, data: bytes | memoryview, *, exclusive: bool) -> None:
    """Write `data` to an s3:// URI; arguments and errors are those of `storage.write_bytes`."""
    path = uri.removeprefix("s3://").rstrip("/")
    if exclusive:
        # Distinguishes this write from another one of the same bytes: a request whose response was lost is retried, by
        # aiohttp even silently, and then finds the object that it has written itself.
        mark = secrets.token_hex(16)
        retried(f"write {uri}", lambda: _create(uri, path, bytes(data), mark))
    elif isinstance(data, memoryview) and len(data) >= 2 * PART_BYTES:
        fs = s3.open_s3(attempts=3)  # which repeats a part that fails, alone
        retried(f"write {uri}", lambda: fs.pipe_file(path, _Parts(data), chunksize=PART_BYTES))
    else:
        fs = s3.open_s3(attempts=3 if len(data) >= SEVERAL_PARTS else 1)
        retried(f"write {uri}", lambda: fs.pipe_file(path, bytes(data)))


def _create(uri: str, path: str, data: bytes, mark: str) -> None:
    """A conditional PUT; an object that carries `mark` is what an earlier attempt wrote."""
    fs = s3.open_s3(attempts=1)
    try:
        fs.pipe_file(path, data, mode="create", Metadata={"write": mark})
    except OSError as error:
        if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") != "PreconditionFailed":
            raise
        if fs.metadata(path).get("write") != mark:
            raise FileExistsError(f"{uri!r} exists") from None
