"""Bytes at a URI: `s3://bucket/key` through s3fs and pyarrow, or a local path.

S3 is configured by the environment names that its tools already use: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_ENDPOINT_URL`, `AWS_DEFAULT_REGION`. fsspec and pyarrow are imported by what uses them: a process that only names
places (`--help`) needs neither.

Every function that talks to S3 repeats what a bad network made fail, for `RETRY_SECONDS`, and says so in the log; then
it raises StorageError. Wrong credentials, a missing bucket or a missing object are errors at once.
"""

import concurrent.futures
import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from d2f_core import s3
from d2f_core.retry import GaveUpError, UnreachableError, is_network_trouble, is_shortage, keep_trying, one_line

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")

CHECK_SECONDS, PROBE_SECONDS = 9.0, 3.0
RETRY_SECONDS = 180.0
"""How long a call to S3 is repeated, from its first failure on."""
SEVERAL_PARTS = 100 * 2**20  # bytes from which s3fs uploads an object in parts
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class StorageError(ValueError):
    """A URI that cannot be used, with the reason and the fix in one line."""


class UnreachableStorageError(StorageError, UnreachableError):
    """S3 or the network to it was away for longer than repetitions bridge."""


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
    """The filesystem for the functions below, whose repetitions are `retried`'s alone and so are seen in the log."""
    return (s3.open_s3(attempts=1) if is_s3(uri) else filesystem(uri)[0]), filesystem(uri)[1]


def _patience(error: Exception) -> float:
    return RETRY_SECONDS if is_network_trouble(error) or is_shortage(error) else 0.0


def retried(what: str, call: Callable[[], T]) -> T:
    """Call, and call again while the network or S3 is in trouble, for `RETRY_SECONDS`; for s3fs and pyarrow alike.

    A machine that is short of memory or open files is such trouble, too.

    Args:
        what: completes "could not ...", e.g. "read s3://bucket/key".

    Raises:
        UnreachableStorageError: it failed for all that time; one line.
        Exception: any other error of `call`, at once.
    """
    try:
        return keep_trying(what, call, patience=_patience)
    except GaveUpError as error:
        raise UnreachableStorageError(
            f"{error}. Check that {os.environ.get('AWS_ENDPOINT_URL', 'AWS')} is up and can be reached from here; the "
            "same command goes on from there."
        ) from error.__cause__


@contextlib.contextmanager
def _whole(target: Path, needed: int) -> Iterator[Path]:
    """A place beside `target` to write a file or directory to; on any error nothing is left there.

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

    if is_s3(uri):
        return retried(f"find the region of {uri}", lambda: pyarrow.fs.FileSystem.from_uri(uri))
    return pyarrow.fs.LocalFileSystem(), filesystem(uri)[1]


def read_bytes(uri: str) -> bytes:
    """The object's bytes. Raises FileNotFoundError when there is none."""
    fs, path = _open(uri)
    return retried(f"read {uri}", lambda: fs.cat_file(path))


def write_bytes(uri: str, data: bytes, *, exclusive: bool = False) -> None:
    """Write one object whole; readers see the old bytes or the new ones, never a part.

    Args:
        exclusive: write only when nothing is there yet (a conditional PUT on S3).

    Raises:
        FileExistsError: `exclusive` and the object exists.
        StorageError: a full disk, or S3 that stays away.
    """
    if is_s3(uri):
        return _put(uri, data, exclusive=exclusive)
    target = Path(filesystem(uri)[1])
    with _whole(target, len(data)) as partial:
        partial.write_bytes(data)
        if exclusive:
            os.link(partial, target)  # fails when the target exists, in one step
        else:
            partial.replace(target)


def _put(uri: str, data: bytes, *, exclusive: bool) -> None:
    fs, path = _open(uri)
    if not exclusive and len(data) >= SEVERAL_PARTS:
        fs = filesystem(uri)[0]  # a part that fails is repeated alone
    # Tells this write from another one of the same bytes: a request whose answer was lost is repeated, by aiohttp even
    # in silence, and then meets the object that it has made itself.
    mark = secrets.token_hex(16)

    def put() -> None:
        if not exclusive:
            return fs.pipe_file(path, data)
        try:
            fs.pipe_file(path, data, mode="create", Metadata={"write": mark})
        except OSError as error:
            if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") != "PreconditionFailed":
                raise
            if fs.metadata(path).get("write") != mark:
                raise FileExistsError(f"{uri!r} exists") from None

    retried(f"write {uri}", put)


def exists(uri: str) -> bool:
    fs, path = _open(uri)
    return bool(retried(f"look for {uri}", lambda: fs.exists(path)))


def list_names(uri: str) -> list[str]:
    """Sorted last path parts of what lies directly under `uri`; empty when there is nothing."""
    fs, path = _open(uri)
    try:
        entries = retried(f"list {uri}", lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
    return sorted(names - {path.rsplit("/", 1)[-1]})


def remove_tree(uri: str) -> None:
    """Delete everything under `uri`; nothing there is fine."""
    fs, path = _open(uri)

    def remove() -> None:
        if fs.exists(path):
            fs.rm(path, recursive=True)

    retried(f"delete {uri}", remove)


def list_tree(uri: str, chosen: Callable[[str], bool] | None = None) -> dict[str, dict[str, Any]]:
    """What the storage tells of every file under `uri`, by path.

    Args:
        chosen: of a file's name relative to `uri`, whether it is wanted; None: all are.
    """
    fs, path = filesystem(uri)
    found = retried(f"list {uri}", lambda: fs.find(path, detail=True))
    relative = lambda file: file.removeprefix(path).lstrip("/")  # noqa: E731
    return {file: info for file, info in found.items() if chosen is None or chosen(relative(file))}


def download_tree(uri: str, target: Path, chosen: Callable[[str], bool] | None = None) -> Path:
    """Copy the files under `uri` into the directory `target`; on an error nothing is left behind at `target`.

    Args:
        chosen: as for `list_tree`.
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
            retried(f"download {file}", lambda file=file, local=local: fs.get_file(file, str(local)))
        try:
            partial.rename(target)
        except OSError:  # another process finished the same download first
            if not target.is_dir():
                raise
    return target


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file as one on this disk: itself, or a copy of the object that goes when the context ends.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = _open(uri)
    if not is_s3(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "object")
        retried(f"download {uri}", lambda: fs.get_file(path, str(copy)))
        yield copy


def upload_tree(source: Path, uri: str, *, last: str = "") -> None:
    """Copy every file of the directory `source` to `uri`; the one named `last` tells readers that all are there."""
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
    """Refuse an unusable place before any work starts, within 10 seconds.

    Raises:
        UnreachableStorageError: no answer; one line.
        StorageError: no credentials, no such bucket or no permission; one line.
    """
    if not is_s3(uri):
        return
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
    bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")

    import fsspec.asyn

    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        session=s3.session(),  # one of its own would read the description of S3's interface anew, 50 ms each time
        config_kwargs={"connect_timeout": 3, "read_timeout": 4, "retries": {"total_max_attempts": 1}},
    )

    def probe() -> None:
        fs.ls(bucket, detail=False)  # a PUT alone may create the bucket, which is not what a misspelt URI asks for
        if write:
            fs.pipe_file(f"{bucket}/{prefix}/.writable", b"")
            fs.rm_file(f"{bucket}/{prefix}/.writable")

    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        # Making the client takes seconds of a busy processor, which are no silence of the server's.
        fsspec.asyn.sync(fs.loop, fs.set_session)
        again = lambda error: PROBE_SECONDS if is_network_trouble(error) else 0.0  # noqa: E731  # a lost packet
        pool.submit(keep_trying, f"reach {uri}", probe, patience=again).result(timeout=CHECK_SECONDS)
    except concurrent.futures.TimeoutError:
        raise UnreachableStorageError(
            f"{uri!r}: {endpoint} gave no answer in {CHECK_SECONDS:.0f} s. Check AWS_ENDPOINT_URL."
        ) from None
    except FileNotFoundError:
        raise StorageError(f"{uri!r}: no bucket {bucket!r} at {endpoint}. Create it, or correct the URI.") from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, GaveUpError) and error.__cause__ else error
        reason = f"{type(cause).__name__}: {one_line(cause, 200)}"
        kind = UnreachableStorageError if isinstance(error, GaveUpError) else StorageError
        raise kind(
            f"{uri!r} is not {'writable' if write else 'readable'} at {endpoint} ({reason}). Check the bucket's name, "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
