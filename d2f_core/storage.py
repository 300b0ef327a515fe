"""Bytes at a URI: `s3://bucket/key` through s3fs and pyarrow, or a local path.

S3 is configured by the environment names that its tools already use: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_ENDPOINT_URL`, `AWS_DEFAULT_REGION`.
"""

import concurrent.futures
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs

CHECK_SECONDS = 9.0


class StorageError(ValueError):
    """A URI that cannot be used, with the reason and the fix in one line."""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI or a local path."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem that serves `uri`, and the path inside it.

    Raises:
        StorageError: the scheme is neither `s3://` nor a local path.
    """
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if scheme not in ("s3", "file"):
        raise StorageError(f"{uri!r} has the scheme {scheme!r}. Use s3://bucket/key or a local path.")
    if scheme == "file":
        return fsspec.filesystem("file"), str(Path(uri.removeprefix("file://")).expanduser().absolute())
    # Listings are never cached: another process (a worker, an earlier attempt) writes the same prefix.
    return fsspec.filesystem("s3", use_listings_cache=False), uri.removeprefix("s3://").rstrip("/")


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem that serves `uri`, and the path inside it."""
    if is_s3(uri):
        return pyarrow.fs.FileSystem.from_uri(uri)
    return pyarrow.fs.LocalFileSystem(), filesystem(uri)[1]


def read_bytes(uri: str) -> bytes:
    """The object's bytes. Raises FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    return fs.cat_file(path)


def write_bytes(uri: str, data: bytes, *, exclusive: bool = False) -> None:
    """Write one object whole; readers see the old bytes or the new ones, never a part.

    Args:
        exclusive: write only when nothing is there yet (a conditional PUT on S3).

    Raises:
        FileExistsError: `exclusive` and the object exists.
    """
    fs, path = filesystem(uri)
    if is_s3(uri):
        try:
            fs.pipe_file(path, data, mode="create" if exclusive else "overwrite")
        except OSError as error:
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if exclusive and code in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise FileExistsError(f"{uri!r} exists") from None
            raise
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    try:
        if exclusive:
            os.link(partial, target)  # fails when the target exists, in one step
        else:
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Sorted last path parts of what lies directly under `uri`; empty when there is nothing."""
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(
        name for entry in entries if (name := entry.rstrip("/").rsplit("/", 1)[-1]) != path.rsplit("/", 1)[-1]
    )


def remove_tree(uri: str) -> None:
    """Delete everything under `uri`; nothing there is fine."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def download_tree(uri: str, target: Path) -> Path:
    """Copy everything under `uri` into the directory `target`; on an error nothing is left behind at `target`."""
    fs, path = filesystem(uri)
    files = fs.find(path)
    if not files:
        raise StorageError(f"{uri!r} holds no files. Check the URI, or write it first.")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for file in files:
        local = partial / file.removeprefix(path).lstrip("/")
        if not local.resolve().is_relative_to(partial.resolve()):
            raise StorageError(f"{file!r} climbs out of {uri!r}. Refused; remove that object.")
        local.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(file, str(local))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.rename(target)
    except OSError:  # another process finished the same download first
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
    return target


def upload_tree(source: Path, uri: str, *, last: str = "") -> None:
    """Copy every file of the directory `source` to `uri`; the one named `last` tells readers that all are there."""
    fs, path = filesystem(uri)
    for file in sorted(source.rglob("*"), key=lambda file: (file == source / last, file)):
        if file.is_file():
            target = f"{path}/{file.relative_to(source).as_posix()}"
            if not is_s3(uri):
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            fs.put_file(str(file), target)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_reachable(uri: str, *, write: bool = False) -> None:
    """Refuse an unusable place before any work starts, within 10 seconds.

    Raises:
        StorageError: no credentials, no such bucket, no permission, or no answer; one line.
    """
    if not is_s3(uri):
        return
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
    bucket = uri.removeprefix("s3://").partition("/")[0]

    def probe() -> None:
        fs = fsspec.filesystem(
            "s3",
            skip_instance_cache=True,
            config_kwargs={"connect_timeout": 3, "read_timeout": 4, "retries": {"total_max_attempts": 1}},
        )
        fs.ls(bucket, detail=False)  # a PUT alone may create the bucket, which is not what a misspelt URI asks for
        if write:
            key = f"{uri.removeprefix('s3://').rstrip('/')}/.writable"
            fs.pipe_file(key, b"")
            fs.rm_file(key)

    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        pool.submit(probe).result(timeout=CHECK_SECONDS)
    except concurrent.futures.TimeoutError:
        raise StorageError(
            f"{uri!r}: {endpoint} gave no answer in {CHECK_SECONDS:.0f} s. Check AWS_ENDPOINT_URL."
        ) from None
    except FileNotFoundError:
        raise StorageError(f"{uri!r}: no bucket {bucket!r} at {endpoint}. Create it, or correct the URI.") from None
    except Exception as error:
        raise StorageError(
            f"{uri!r} is not {'writable' if write else 'readable'} at {endpoint} ({_reason(error)}). Check the "
            "bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
