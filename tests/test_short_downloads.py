"""An answer that ends early and looks whole is asked for once more; what is damaged on the storage is told then."""

import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from botocore.exceptions import FlexibleChecksumError

from benchmarks.fault_proxy import FaultProxy
from d2f_core import s3_calls, storage
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import Manifest, ManifestError, read_file, read_manifest, write_manifest, write_part
from d2f_core.data.schema import array_field
from d2f_core.data.sources.tar_archive import DamagedArchiveError, read_tar
from d2f_core.data.table_reader import TableReader
from d2f_core.s3_calls import ChecksumError, ShortDownloadError, fetched_whole, read_on, retried
from d2f_core.tracking import model_files
from d2f_core.train.checkpoint import CheckpointError, list_checkpoints, read_checkpoint, read_tensors
from infra.local.stack import StackEnv
from tests.train.test_checkpoint import write

ROOT = "s3://d2f/test-short"


class Damage(ValueError):
    pass


@pytest.fixture
def renewed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that new connections are opened."""
    found: list[str] = []
    monkeypatch.setattr(s3_calls.s3, "reconnect", lambda: found.append("new"))
    return found


@pytest.mark.parametrize(
    ("uri", "wrong", "calls", "passes"),
    [
        ("s3://b/k", 0, 1, True),
        ("s3://b/k", 1, 2, True),
        ("s3://b/k", 9, 2, False),
        ("models:/m/1", 1, 2, True),
        ("/local/k", 1, 1, False),
        ("file:///local/k", 1, 1, False),
    ],
)
def test_what_is_not_whole_is_fetched_twice_and_no_more(
    uri: str, wrong: int, calls: int, passes: bool, renewed: list[str]
) -> None:
    made: list[int] = []

    def fetch() -> str:
        made.append(0)
        if len(made) <= wrong:
            raise Damage(f"try {len(made)}")
        return "whole"

    if passes:
        assert fetched_whole(uri, fetch, Damage) == "whole"
    else:
        with pytest.raises(Damage, match=f"try {calls}"):
            fetched_whole(uri, fetch, Damage)
    assert len(made) == calls and len(renewed) == calls - 1


def test_another_error_is_no_damage(renewed: list[str]) -> None:
    def fetch() -> None:
        raise FileNotFoundError("none")

    with pytest.raises(FileNotFoundError):
        fetched_whole("s3://b/k", fetch, Damage)
    assert not renewed


@pytest.mark.parametrize(("wrong", "calls"), [(1, 2), (9, 2)])
def test_what_does_not_have_the_checksum_that_s3_states_is_fetched_twice_and_no_more(
    wrong: int, calls: int, renewed: list[str]
) -> None:
    made: list[int] = []

    def read() -> bytes:
        made.append(0)
        if len(made) <= wrong:
            raise FlexibleChecksumError(error_msg="Expected checksum fIWP8Q== did not match")
        return b"whole"

    if wrong < 2:
        assert retried("read s3://b/k", read) == b"whole"
    else:
        with pytest.raises(
            ChecksumError, match=r"^could not read s3://b/k: what came twice has a wrong checksum \(.*proxy"
        ):
            retried("read s3://b/k", read)
    assert len(made) == calls and renewed == ["new"]


@pytest.mark.parametrize(("good", "expected"), [([2, 5], 5), ([2, 3], 3), ([5], 5), ([0, 0], 0)])
def test_a_file_is_read_on_from_where_it_broke_off(good: list[int], expected: int, renewed: list[str]) -> None:
    """Of five items; each try can read so many."""
    tries = iter(good)

    def start() -> Iterator[int]:
        readable = next(tries)
        yield from range(readable)
        if readable < 5:
            raise Damage(f"after {readable}")

    found = []
    with pytest.raises(Damage) if expected < 5 else pytest.MonkeyPatch.context():
        for item in read_on("s3://b/k", start, lambda error: isinstance(error, Damage)):
            found.append(item)
    assert found == list(range(expected)) and len(renewed) == len(good) - 1


def test_a_registered_model_that_comes_damaged_is_fetched_once_more(
    tmp_path: Path, renewed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def download(source: str, target: Path, expected: str) -> None:
        tries.append(source)
        if len(tries) < 2:
            raise model_files.DamagedModelError("other files")
        target.mkdir()

    class Client:
        def get_model_version_download_uri(self, name: str, version: str) -> str:
            return "mlflow-artifacts:/1"

    class Version:
        name, version, tags = "m", "1", {"d2f.content_hash": "0" * 64}

    monkeypatch.setattr(model_files, "client_for", lambda uri: Client())
    monkeypatch.setattr(model_files, "tracking_uri", lambda: "http://127.0.0.1:1")
    monkeypatch.setattr(model_files, "find_version", lambda client, uri: Version())
    monkeypatch.setattr(model_files, "download_model", download)
    assert Path(model_files.resolve_model("models:/m/1", cache_dir=tmp_path)).is_dir() and len(tries) == 2


@pytest.fixture
def proxy(s3: StackEnv, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[FaultProxy]:
    """In front of the session's S3 server, and named by the environment."""
    caplog.set_level(logging.WARNING)
    with FaultProxy.before(s3.variables["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def test_a_short_download_comes_whole_at_the_second_try(
    proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = b"0123456789" * 100
    storage.write_bytes(f"{ROOT}/tree/a", data)
    proxy.short = 1
    assert (storage.download_tree(f"{ROOT}/tree", tmp_path / "tree") / "a").read_bytes() == data
    proxy.short = 1
    with storage.local_file(f"{ROOT}/tree/a") as copy:
        assert copy.read_bytes() == data
    assert proxy.counts["short"] == 2 and caplog.text.count("once more over a new connection") == 2
    proxy.short = 9
    with pytest.raises(ShortDownloadError, match=r"tree/a: 500 bytes came, and it has 1,000\. Look for a proxy"):
        storage.download_tree(f"{ROOT}/tree", tmp_path / "again")
    assert proxy.counts["short"] == 4 and not (tmp_path / "again").exists(), "asked for exactly twice"


def test_a_checkpoint_is_damaged_only_if_it_comes_so_twice(proxy: FaultProxy, tmp_path: Path) -> None:
    output = f"{ROOT}/run"
    write(Path(tmp_path, "run"), 5)
    storage.upload_tree(tmp_path / "run", output)
    (found,) = list_checkpoints(output)
    proxy.short = 1
    assert read_checkpoint(found.uri) == found
    proxy.short = 1
    assert read_tensors(found, "weights").keys() == found.manifest.tensors["weights"].keys()
    assert proxy.counts["short"] == 2
    place = storage.join(found.uri, found.manifest.files[0].path)
    storage.write_bytes(place, storage.read_bytes(place)[:-1])
    before = proxy.counts["requests"]
    with pytest.raises(CheckpointError, match="its manifest says"):
        read_tensors(found, found.manifest.files[0].kind)
    assert proxy.counts["requests"] - before == 2


def test_a_table_loses_no_row_to_a_short_answer(proxy: FaultProxy) -> None:
    schema = pa.schema([array_field("latent", "float16", (64, 64))])
    rows = arrays_to_table({"latent": np.random.default_rng(0).normal(size=(8, 64, 64))}, schema)
    uri = f"{ROOT}/table"
    write_manifest(uri, Manifest(kind="images", files=(write_part(uri, "part-0.parquet", rows, row_group_rows=8),)))
    proxy.short = 1
    manifest = read_manifest(uri)
    reader = TableReader(uri, manifest, ["latent"])
    assert not reader.read(0, 8).reasons  # the footer is known from now on
    proxy.short = 1
    assert not reader.read(0, 8).reasons
    proxy.short = 1
    assert len(read_file(uri, manifest.files[0])) == manifest.files[0].size and proxy.counts["short"] == 3
    storage.write_bytes(f"{uri}/part-0.parquet", b"other")
    with pytest.raises(ManifestError, match=r"part-0\.parquet': 5 bytes came that are not the"):
        read_file(uri, manifest.files[0])


def test_a_tar_loses_no_sample_to_a_short_answer(proxy: FaultProxy) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{number:02d}.txt")
            member.size = 2000
            archive.addfile(member, io.BytesIO(b"x" * 2000))
    storage.write_bytes(f"{ROOT}/a.tar", sink.getvalue())
    proxy.short = 1
    assert [key for key, _ in read_tar(f"{ROOT}/a.tar", lambda _: 10_000)] == [f"{n:02d}" for n in range(20)]
    assert proxy.counts["short"] == 1
    storage.write_bytes(f"{ROOT}/a.tar", sink.getvalue()[:20_000])
    with pytest.raises(DamagedArchiveError, match="nothing can be read after 7 samples"):
        list(read_tar(f"{ROOT}/a.tar", lambda _: 10_000))
