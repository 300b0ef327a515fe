"""Replaces an object only while it is still the one that was read: on S3 by conditional PUTs, locally under a lock.

S3 answers a PUT with `If-Match` by 412 when the object is another one by now, by 404 when it is gone, and by 409 when
another write of it is under way, after which the request is repeated:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_core import s3
from d2f_core.hashing import one_at_a_time
from d2f_core.s3_calls import retried
from d2f_core.storage import filesystem, is_s3, write_bytes

ANOTHER = {"PreconditionFailed", "NoSuchKey"}
"""S3's codes when the object is not the expected one."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An object as it was read."""

    data: bytes
    tag: str
    """Changes with the content: the ETag on S3, the digest of a local file."""


def read(uri: str) -> Stored | None:
    """The object at an s3:// URI or a local path; None when there is none."""
    try:
        return retried(f"read {uri}", lambda: _get(uri)) if is_s3(uri) else _read_file(_path(uri))
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise
        return None


def swap(uri: str, data: bytes, tag: str | None) -> str | None:
    """Write `data` if the object is the one that was read; of several processes that try it, one succeeds.

    Args:
        data: unlike all that was ever written there (a random token makes it so): a write whose answer was lost is
            recognized by it.
        tag: of the object that was read; None: there was none.

    Returns:
        The object's new tag; None when another process was first.

    Raises:
        UnreachableStorageError: S3 stays unavailable.
        OSError: it cannot be written there.
    """
    if is_s3(uri):
        return retried(f"write {uri}", lambda: _put(uri, data, tag))
    path = _path(uri)
    with one_at_a_time(path):
        there = _read_file(path) if path.exists() else None
        if (there and there.tag) != tag:
            return None
        write_bytes(uri, data)
    return _digest(data)


def _path(uri: str) -> Path:
    return Path(filesystem(uri)[1])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_file(path: Path) -> Stored:
    data = path.read_bytes()
    return Stored(data=data, tag=_digest(data))


def _address(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    return {"Bucket": bucket, "Key": key}


def _get(uri: str) -> Stored:
    import fsspec.asyn

    fs = s3.open_s3(attempts=1)

    async def get() -> Stored:
        answer: Any = await fs._call_s3("get_object", **_address(uri))
        async with answer["Body"] as body:
            return Stored(data=await body.read(), tag=answer["ETag"])

    stored = fsspec.asyn.sync(fs.loop, get)
    assert stored is not None
    return stored


def _put(uri: str, data: bytes, tag: str | None) -> str | None:
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    fs = s3.open_s3(attempts=1)
    try:
        return fs.call_s3("put_object", **_address(uri), Body=data, **condition)["ETag"]
    except OSError as error:
        if _code(error) not in ANOTHER:
            raise
    try:
        there = _get(uri)
    except FileNotFoundError:
        return None
    return there.tag if there.data == data else None  # written by an attempt whose answer was lost


def _code(error: OSError) -> str:
    """S3's code of an error that s3fs has translated."""
    return str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", ""))
