"""Storage on a bad network and on a full disk: a real S3 server behind the proxy of `benchmarks/fault_proxy.py`."""

import errno
import http.client
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError, SSLError

from benchmarks.fault_proxy import FaultProxy
from d2f_core import retry, s3_calls, s3_put, storage
from d2f_core import s3 as s3_client
from d2f_core.model.base import local_copy
from d2f_core.retry import is_network_trouble
from d2f_core.storage import StorageError, UnreachableStorageError
from infra.local.stack import StackEnv

BIG = os.urandom(1_000_000)


@pytest.fixture
def proxy(s3: StackEnv, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[FaultProxy]:
    """In front of the session's S3 server, and named by the environment."""
    caplog.set_level(logging.WARNING)
    with FaultProxy.before(s3.variables["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(s3_calls, "RETRY_SECONDS", 60.0)
        yield running


def test_errors_and_cut_answers_change_nothing_but_the_time(
    proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/a").write_bytes(b"a")
    (tmp_path / "tree/deep/b").write_bytes(BIG)
    proxy.error_rate, proxy.reset_rate = 0.25, 0.15
    root = "s3://d2f/test-storage/noise"
    for number in range(9):
        storage.write_bytes(f"{root}/objects/{number}", bytes([number]) + BIG, exclusive=number % 2 == 0)
    assert storage.list_names(f"{root}/objects") == [str(number) for number in range(9)]
    for number in range(9):
        assert storage.read_bytes(f"{root}/objects/{number}") == bytes([number]) + BIG
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{root}/objects/0", b"other", exclusive=True)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/objects/none")
    storage.upload_tree(tmp_path / "tree", f"{root}/tree", last="a")
    storage.download_tree(f"{root}/tree", tmp_path / "copy")
    assert (tmp_path / "copy/a").read_bytes() == b"a" and (tmp_path / "copy/deep/b").read_bytes() == BIG
    chosen = storage.download_tree(f"{root}/tree", tmp_path / "chosen", lambda name: name == "deep/b")
    assert [file.name for file in chosen.rglob("*") if file.is_file()] == ["b"]
    storage.remove_tree(root)
    assert not storage.exists(f"{root}/objects/1") and not storage.exists(f"{root}/tree/a")
    assert proxy.counts["error"] >= 3 and proxy.counts["reset"] >= 3
    assert "could not" in caplog.text and "again in" in caplog.text


def test_a_known_key_costs_one_request_whether_it_is_there_or_not(proxy: FaultProxy) -> None:
    there, missing = "s3://d2f/test-storage/known", "s3://d2f/test-storage/unknown"
    storage.write_bytes(there, b"1")
    storage.file_exists(there)  # the first request of a client may be repeated
    before = proxy.counts["requests"]
    assert storage.file_exists(there) and not storage.file_exists(missing)
    assert not storage.file_exists("s3://d2f/test-storage"), "a directory is no file"
    assert storage.read_bytes(there, small=True) == b"1"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(missing, small=True)
    assert proxy.counts["requests"] - before == 5


def test_a_view_is_sent_in_parts_as_it_is(proxy: FaultProxy) -> None:
    data, uri = os.urandom(2 * s3_put.PART_BYTES + 1), "s3://d2f/test-storage/view"
    before = proxy.counts["requests"]
    storage.write_bytes(uri, memoryview(data))
    assert proxy.counts["requests"] - before >= 2 + 2  # a beginning, an end, and at least two parts
    assert storage.read_bytes(uri) == data
    with pytest.raises(FileExistsError):
        storage.write_bytes(uri, memoryview(data), exclusive=True)


def test_an_exclusive_write_whose_answer_is_lost_is_its_own(proxy: FaultProxy) -> None:
    uri = "s3://d2f/test-storage/claim"
    proxy.upcoming.extend(["reset", "reset", "reset"])
    storage.write_bytes(uri, b"mine", exclusive=True)
    assert proxy.counts["reset"] == 3 and storage.read_bytes(uri) == b"mine"
    for data in (b"mine", b"another"):  # the same bytes from another writer are no excuse
        with pytest.raises(FileExistsError):
            storage.write_bytes(uri, data, exclusive=True)
    proxy.upcoming.extend(["error", "reset", "reset"])
    with pytest.raises(FileExistsError):
        storage.write_bytes(uri, b"mine", exclusive=True)
    assert storage.read_bytes(uri) == b"mine"


def test_an_outage_is_waited_for(proxy: FaultProxy) -> None:
    storage.write_bytes("s3://d2f/test-storage/outage", b"1")
    began = time.monotonic()
    proxy.outage_for(3.0)
    assert storage.read_bytes("s3://d2f/test-storage/outage") == b"1"
    assert 2.5 < time.monotonic() - began < 15


def test_a_model_is_fetched_through_an_outage_that_lasts_longer_than_a_probe(proxy: FaultProxy, tmp_path: Path) -> None:
    storage.write_bytes("s3://d2f/test-outlasts/b.json", b"{}")
    proxy.outage_for(storage.PROBE_SECONDS + 2)
    assert (local_copy("s3://d2f/test-outlasts", cache_dir=tmp_path) / "b.json").read_bytes() == b"{}"


def test_an_upload_that_is_cut_late_is_sent_again(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is cut after 200 s, longer than failing calls are repeated; the clock is moved on, not waited for."""
    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], sleep=time.sleep)
    monkeypatch.setattr(retry, "time", clock)
    fs, path = storage.filesystem("s3://d2f/test-storage/late")

    def put() -> None:
        passed[0] += 200.0
        fs.pipe_file(path, BIG)

    proxy.upcoming.extend(["reset"] * 6)  # s3fs makes some requests of its own, in silence
    storage.retried("write it", put)
    assert proxy.counts["reset"] == 6 and storage.read_bytes("s3://d2f/test-storage/late") == BIG


def test_a_misspelt_bucket_is_refused_and_not_made(s3: StackEnv) -> None:
    for _ in range(2):
        with pytest.raises(StorageError, match="no bucket 'd2g' at"):
            storage.check_reachable("s3://d2g/test-storage", write=True)
    storage.check_reachable("s3://d2f/test-storage/nothing/yet", write=True)
    assert not storage.exists("s3://d2f/test-storage/nothing/yet/.writable")


def test_an_outage_without_end_is_one_line(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_calls, "RETRY_SECONDS", 1.0)
    proxy.outage = True
    with pytest.raises(StorageError, match=r"could not read s3://d2f/any in \d+ attempts over \d+ s: .*Check that"):
        storage.read_bytes("s3://d2f/any")
    with pytest.raises(UnreachableStorageError, match="is not readable at"):
        storage.check_reachable("s3://d2f/any")


def test_a_stalled_server_is_noticed(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "READ_TIMEOUT", 1)
    proxy.stall_seconds = 600.0
    uri = "s3://d2f/test-storage/stall"
    for call in (lambda: storage.write_bytes(uri, BIG), lambda: storage.read_bytes(uri)):
        proxy.upcoming.append("stall")
        began = time.monotonic()
        call()
        assert time.monotonic() - began < 10
    assert proxy.counts["stall"] == 2 and storage.read_bytes(uri) == BIG


def test_a_pyarrow_reader_is_retried(proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    table = pa.table({"x": list(range(1000))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes("s3://d2f/test-storage/table.parquet", sink.getvalue().to_pybytes())
    fs, path = storage.arrow_filesystem("s3://d2f/test-storage/table.parquet")

    def end_once_told() -> None:
        """The SDK's own attempts are silent, and last for seconds."""
        deadline = time.monotonic() + 60
        while "could not read the table" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        proxy.outage = False

    proxy.outage = True
    with ThreadPoolExecutor(1) as pool:
        pool.submit(end_once_told)
        assert storage.retried("read the table", lambda: pq.read_table(path, filesystem=fs)).equals(table)
    assert "could not read the table" in caplog.text


@pytest.mark.parametrize("wrong", ["secret", "key"])
def test_wrong_credentials_are_refused_at_once(
    wrong: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write_bytes("s3://d2f/test-storage/secret", b"1")
    monkeypatch.setenv({"secret": "AWS_SECRET_ACCESS_KEY", "key": "AWS_ACCESS_KEY_ID"}[wrong], "wrong")
    before = proxy.counts["requests"]
    for call in (storage.read_bytes, storage.list_names, storage.exists, storage.remove_tree):
        with pytest.raises(PermissionError):
            call("s3://d2f/test-storage/secret")
    with pytest.raises(PermissionError):
        storage.write_bytes("s3://d2f/test-storage/secret", b"2")
    assert proxy.counts["requests"] - before <= 7 and "again in" not in caplog.text
    fs, path = storage.arrow_filesystem("s3://d2f/test-storage/secret")
    began = time.monotonic()
    with pytest.raises(UnreachableStorageError, match=r"ACCESS_DENIED.*AWS_ACCESS_KEY_ID, AWS_"):
        storage.retried("read", lambda: fs.open_input_file(path))  # it does not tell a wrong key from none
    assert time.monotonic() - began < 10
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        storage.check_reachable("s3://d2f/test-storage", write=True)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, UnreachableStorageError)


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 56, Failure when receiving data",
        "AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.",
        "AWS Error INTERNAL_FAILURE during GetObject operation",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
    ],
)
def test_pyarrow_tells_network_trouble_by_its_text(text: str) -> None:
    assert is_network_trouble(OSError(text))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"half"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        SSLError(endpoint_url="https://s3", error="EOF occurred in violation of protocol"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_connection_is_network_trouble(error: Exception) -> None:
    assert is_network_trouble(error)


def test_a_certificate_that_is_not_trusted_stays_so_and_is_not_tried_again() -> None:
    text = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
    assert not is_network_trouble(SSLError(endpoint_url="https://s3", error=text))


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error UNKNOWN (HTTP status 501) during PutObject operation"),
        FileNotFoundError("s3://d2f/a"),
        StorageError("gave up"),
        KeyError("a"),
    ],
)
def test_the_callers_errors_are_not_network_trouble(error: Exception) -> None:
    error.__context__ = ConnectionResetError()
    assert not is_network_trouble(error)


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/file", "S3://bucket/key"])
def test_another_scheme_is_refused(uri: str) -> None:
    scheme = uri.partition(":")[0]
    with pytest.raises(StorageError, match=rf"'{uri}' has the scheme '{scheme}'\. Use s3://bucket/key or a local path"):
        storage.read_bytes(uri)


def test_an_empty_prefix_and_an_object_that_climbs_out_are_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[str, dict[str, int]] = {}
    fetched: list[str] = []
    fs = SimpleNamespace(find=lambda *_, **__: found, get_file=lambda file, _: fetched.append(file))
    monkeypatch.setattr(storage, "filesystem", lambda _: (fs, "bucket/model"))
    with pytest.raises(StorageError, match=r"'s3://bucket/model' holds no files\. Check the URI, or write it first"):
        storage.download_tree("s3://bucket/model", tmp_path / "target")
    for name in ("bucket/model/../../../climbed", "bucket/model/a/../../climbed"):
        found.clear()
        found[name] = {"size": 1}
        with pytest.raises(StorageError, match=r"climbed' climbs out of 's3://bucket/model'\. Refused; remove that"):
            storage.download_tree("s3://bucket/model", tmp_path / "target")
    assert not fetched and not list(tmp_path.iterdir())


FULL_DISK = """
import sys
from pathlib import Path
from d2f_core import s3 as s3_client
from d2f_core import storage
from d2f_core.model.base import local_copy

source, target = Path(sys.argv[1]), Path(sys.argv[2])
for number, call in enumerate([
    lambda: storage.write_bytes(str(target / "object"), b"x" * 200_000),
    lambda: storage.upload_tree(source, str(target / "tree")),
    lambda: storage.download_tree(str(source), target / "copy"),
]):
    try:
        call()
    except storage.StorageError as error:
        print(number, error)
"""


def test_two_processes_of_a_node_fetch_a_model_once(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHECK_SECONDS", 60.0)  # a busy machine is not what is tested
    for name in ("unet/a.safetensors", "b.json"):
        storage.write_bytes(f"s3://d2f/test-once/{name}", BIG)

    def requests(folder: str, times: int) -> int:
        before = proxy.counts["requests"]
        with ThreadPoolExecutor(2) as pool:
            copies = [pool.submit(local_copy, "s3://d2f/test-once", cache_dir=tmp_path / folder) for _ in range(times)]
        assert all((copy.result() / "unet/a.safetensors").read_bytes() == BIG for copy in copies)
        return proxy.counts["requests"] - before

    alone, there_already = requests("one", 1), requests("one", 1)
    assert requests("two", 2) == alone + there_already


def test_a_machine_short_of_open_files_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Any] = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENFILE, "Too many"), b"1"]

    def read() -> bytes:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    assert storage.retried("read", read) == b"1"
    assert "Too many open files" in caplog.text
    answers[:] = [pa.ArrowMemoryError("malloc of size 1e12"), b"1"]
    with pytest.raises(pa.ArrowMemoryError):
        storage.retried("read a damaged file", read)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "big").write_bytes(b"x" * 200_000)
    (target / "object").write_bytes(b"old")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-B", "-c", FULL_DISK, str(source), str(target)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert [line[0] for line in lines] == ["0", "1", "2"], done.stdout + done.stderr
    assert all("needs 200,000 bytes" in line and str(target) in line and "Free space" in line for line in lines)
    assert [(file.name, file.read_bytes()) for file in target.rglob("*") if file.is_file()] == [("object", b"old")]
    assert not list(target.rglob("*.partial"))


def test_keys_are_plain_characters_to_every_reader_and_writer(s3: StackEnv) -> None:
    root = f"s3://d2f/test-storage/{os.urandom(8).hex()}"
    names = ["a b", "a%20b", "a#b", "a?b", "a?x=1&endpoint_override=nowhere", "[ab]*", "ü+a:b"]
    for number, name in enumerate(names):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"number": [number]}), sink)
        storage.write_bytes(f"{root}/{name}/x.parquet", sink.getvalue().to_pybytes())
    for number, name in enumerate(names):
        fs, path = storage.arrow_filesystem(f"{root}/{name}/x.parquet")
        assert pq.read_table(path, filesystem=fs)["number"].to_pylist() == [number]
        assert storage.list_names(f"{root}/{name}") == ["x.parquet"]
    for name in ("a?b", "[ab]*"):  # which, read as patterns, are other keys too
        storage.remove_tree(f"{root}/{name}")
        names.remove(name)
        assert storage.list_names(root) == sorted(names)


def test_a_key_that_s3_keeps_is_named() -> None:
    fs = SimpleNamespace(
        find=lambda path, withdirs: [f"{path}/a", f"{path}/b"],
        call_s3=lambda *_, **__: {"Errors": [{"Key": "k/b", "Code": "AccessDenied", "Message": "no"}]},
    )
    with pytest.raises(StorageError, match=r"s3://bucket/k/b cannot be deleted \(AccessDenied: no\)"):
        s3_calls.remove_objects(fs, "bucket/k")
