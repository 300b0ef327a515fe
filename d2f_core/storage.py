"""Bytes at a URI: `s3://bucket/key` through s3fs and pyarrow, or a local path.

S3 is configured by the environment names that its tools already use: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_ENDPOINT_URL`, `AWS_DEFAULT_REGION`, or a machine's role. fsspec and pyarrow are imported by what uses them: a
process that only names places (`--help`) needs neither.

What a bad network made fail is repeated by `s3_calls.retried`, and then is a StorageError. A wrong secret, a missing
bucket or a missing object are errors at once.
"""

import concurrent.futures
import contextlib
import errno
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f_core import s3, s3_put
from d2f_core.retry import GaveUpError, is_credential_trouble, is_network_trouble, keep_trying, one_line
from d2f_core.s3_calls import StorageError, UnreachableStorageError, download, remove_objects, renewing, retried

if TYPE_CHECKING:
    import pyarrow.fs

Fetch = Callable[[str, int, Path], None]

CHECK_SECONDS, PROBE_SECONDS = 9.0, 3.0
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


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
        import fsspec

        return fsspec.filesystem("file"), str(Path(uri.removeprefix("file://")).expanduser().absolute())
    return s3.open_s3(attempts=3), uri.removeprefix("s3://").rstrip("/")


def _open(uri: str) -> tuple[Any, str]:
    """The filesystem for the functions below, without retries of its own: those of `retried` are logged."""
    return (s3.open_s3(attempts=1) if is_s3(uri) else filesystem(uri)[0]), filesystem(uri)[1]


@contextlib.contextmanager
def _whole(target: Path, needed: int) -> Iterator[Path]:
    """Temporary path beside `target` to write a file or directory to; on any error nothing is left there.

    Raises:
        StorageError: the disk is full.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        free = shutil.disk_usage(next(parent for parent in target.parents if parent.is_dir())).free
        raise StorageError(
            f"{str(target)!r} needs {needed:,} bytes, which do not fit ({error.strerror}; {free:,} bytes are free "
            "there). Free space, raise the quota or the file size limit (`ulimit -f`), or choose another place."
        ) from None
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def arrow_filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """The pyarrow filesystem that serves `uri`, and the path inside it; wrap its reads in `retried`."""
    import pyarrow.fs

    path = filesystem(uri)[1]
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), path
    # The bucket alone: in a key, `%20`, blanks, `#` and `?` are plain characters, and `from_uri` parses them.
    bucket = f"s3://{path.partition('/')[0]}"
    return retried(f"find the region of {uri}", lambda: pyarrow.fs.FileSystem.from_uri(bucket))[0], path


def read_bytes(uri: str, start: int | None = None, end: int | None = None, *, small: bool = False) -> bytes:
    """The object's bytes, or those from `start` up to `end`. Raises FileNotFoundError when it does not exist.

    Args:
        small: ask S3 once; otherwise for the size first, because a large object comes faster in parts side by side.
    """
    fs, path = _open(uri)
    options = {"max_concurrency": 1} if small and is_s3(uri) else {}
    return retried(f"read {uri}", lambda: fs.cat_file(path, start=start, end=end, **options))


def write_bytes(uri: str, data: bytes | memoryview, *, exclusive: bool = False) -> None:
    """Write one object atomically: readers see the old bytes or the new ones, never a part.

    Args:
        data: a view is sent to S3 in small parts, each copied only when its turn comes, so that writing gigabytes
            neither copies them all nor keeps other threads from running.
        exclusive: write only if the object does not exist (a conditional PUT on S3).

    Raises:
        FileExistsError: `exclusive` and the object exists.
        StorageError: the disk is full, or S3 stays unavailable.
    """
    if is_s3(uri):
        return s3_put.put(uri, data, exclusive=exclusive)
    target = Path(filesystem(uri)[1])
    with _whole(target, len(data)) as partial:
        partial.write_bytes(data)
        if exclusive:
            os.link(partial, target)  # fails atomically when the target exists
        else:
            partial.replace(target)


def exists(uri: str) -> bool:
    fs, path = _open(uri)
    return bool(retried(f"look for {uri}", lambda: fs.exists(path)))


def file_exists(uri: str) -> bool:
    """Whether there is an object of exactly this key, by one HEAD; `exists` also lists, for it may be a directory."""
    if not is_s3(uri):
        return Path(filesystem(uri)[1]).is_file()
    fs, path = _open(uri)
    bucket, _, key = path.partition("/")
    try:
        retried(f"look for {uri}", lambda: fs.call_s3("head_object", Bucket=bucket, Key=key))
    except FileNotFoundError:
        return False
    return True


def list_names(uri: str) -> list[str]:
    """Sorted names of the files and directories directly under `uri`; empty when there are none."""
    fs, path = _open(uri)
    try:
        entries = retried(f"list {uri}", lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
    return sorted(names - {path.rsplit("/", 1)[-1]})


def remove_tree(uri: str) -> None:
    """Delete everything under `uri`, if anything exists."""
    fs, path = _open(uri)
    if is_s3(uri):
        remove_objects(fs, path)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def list_tree(uri: str, chosen: Callable[[str], bool] | None = None) -> dict[str, dict[str, Any]]:
    """The storage's properties of every file under `uri`, by path; of those `chosen` by the name relative to `uri`."""
    fs, path = filesystem(uri)
    found = retried(f"list {uri}", lambda: fs.find(path, detail=True))
    return {file: found[file] for file in found if chosen is None or chosen(file.removeprefix(path).lstrip("/"))}


def download_tree(
    uri: str, target: Path, chosen: Callable[[str], bool] | None = None, fetch: Fetch | None = None
) -> Path:
    """Copy the files under `uri` (`chosen` as for `list_tree`) into the directory `target`; on errors none is left.
    `fetch` puts a file, by its path there and its bytes, at a local path; None: it is copied whole.
    """
    fs, path = filesystem(uri)
    found = list_tree(uri, chosen)
    if not found:
        raise StorageError(f"{uri!r} holds no files. Check the URI, or write it first.")
    with _whole(target, sum(int(info["size"]) for info in found.values())) as partial:
        for file in found:
            local = partial / file.removeprefix(path).lstrip("/")
            if not local.resolve().is_relative_to(partial.resolve()):
                raise StorageError(f"{file!r} climbs out of {uri!r}. Refused; remove that object.")
            local.parent.mkdir(parents=True, exist_ok=True)
            size = int(found[file]["size"])
            if fetch:
                retried(f"download {file}", functools.partial(fetch, file, size, local))
            else:
                download(fs, file, local, size)
        try:
            partial.rename(target)
        except OSError:  # another process finished the same download first
            if not target.is_dir():
                raise
    return target


@contextlib.contextmanager
def local_file(uri: str, directory: Path | None = None, *, by_size: bool = True) -> Iterator[Path]:
    """A local path of the file: the file itself, or a copy of the object that is deleted when the context ends.

    Args:
        directory: where the copy is made; None: where temporary files are.
        by_size: compare the copy's size with what S3 says; whoever knows the hash has no need for it.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    fs, path = _open(uri)
    if not is_s3(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(dir=directory) as own:
        copy = Path(own, "object")
        download(fs, path, copy, int(retried(f"look for {uri}", lambda: fs.info(path))["size"]) if by_size else None)
        yield copy


def upload_tree(source: Path, uri: str, *, last: str = "") -> None:
    """Copy every file of the directory `source` to `uri`; the file named `last` is written last, and marks
    completeness.
    """
    fs, path = filesystem(uri)
    for file in sorted(source.rglob("*"), key=lambda file: (file == source / last, file)):
        if not file.is_file():
            continue
        target = f"{path}/{file.relative_to(source).as_posix()}"
        if is_s3(uri):
            retried(f"upload {target}", lambda file=file, target=target: fs.put_file(str(file), target))
        else:
            with _whole(Path(target), file.stat().st_size) as partial:
                shutil.copyfile(file, partial)
                partial.replace(target)


def check_reachable(uri: str, *, write: bool = False) -> None:
    """Refuse an unusable URI before any work starts, within 10 seconds.

    Raises:
        UnreachableStorageError: no answer; one line.
        StorageError: no credentials, no such bucket or no permission; one line.
    """
    if not is_s3(uri):
        return
    place, bucket = s3.endpoint(), uri.split("/")[2]
    try:
        _probe(uri, write)
    except FileNotFoundError:
        raise StorageError(f"{uri!r}: no bucket {bucket!r} at {place}. Create it, or correct the URI.") from None
    except concurrent.futures.TimeoutError:
        raise UnreachableStorageError(
            f"{uri!r}: {place} gave no answer in {CHECK_SECONDS:.0f} s. Check AWS_ENDPOINT_URL."
        ) from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, GaveUpError) and error.__cause__ else error
        reason = f"{type(cause).__name__}: {one_line(cause, 200)}"
        kind = UnreachableStorageError if isinstance(error, GaveUpError) else StorageError
        raise kind(
            f"{uri!r} is not {'writable' if write else 'readable'} at {place} ({reason}). Check the bucket's name, "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL."
        ) from None


def _probe(uri: str, write: bool) -> None:
    """Ask for one key, and write and delete one when `write`; ends within `CHECK_SECONDS`."""
    import fsspec.asyn

    bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
    fs, below = s3.open_for_a_probe(), f"{prefix}/" if prefix else ""
    failed: list[Exception] = []

    def ask() -> None:
        # First, for a PUT alone may create the bucket. One key below the prefix: credentials may be good there alone.
        fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=below, MaxKeys=1)
        if write:
            fs.pipe_file(f"{bucket}/{below}.writable", b"")
            fs.rm_file(f"{bucket}/{below}.writable")

    def patience(error: Exception) -> float:
        failed.append(error)
        if is_credential_trouble(error):
            return s3.FIRST_CREDENTIAL_SECONDS
        return PROBE_SECONDS if is_network_trouble(error) else 0.0  # one lost packet is no refusal

    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        # Creating the client may take seconds on a busy CPU, which must not count as the server's silence.
        fsspec.asyn.sync(fs.loop, fs.set_session)
        pool.submit(keep_trying, f"reach {uri}", renewing(ask), patience=patience).result(timeout=CHECK_SECONDS)
    except concurrent.futures.TimeoutError:
        raise failed[-1] if failed else concurrent.futures.TimeoutError from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
