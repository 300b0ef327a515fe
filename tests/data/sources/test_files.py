"""Which files a source's URI names: patterns, links, splits; and that nothing is left out in silence."""

import hashlib
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from d2f_core.data.sources.config import DepthSource, ImageSource
from d2f_core.data.sources.depth import plan_depth
from d2f_core.data.sources.files import expand, split_of
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import SourceError
from d2f_core.identity import canonical_json
from tests.data.pictures import pictures, tar_bytes, write_folder, write_parquet, write_tars


def names(uri: str, **how) -> list[str]:
    shards = plan_images(ImageSource(uri=uri, **how)).shards
    return [Path(sample.source_uri.partition("#")[0]).name for shard in shards for sample in shard.read()]


def test_a_pattern_stands_for_its_places_in_order() -> None:
    assert expand("s3://b/x-{08..11}.tar") == [f"s3://b/x-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand("a/{x,y}/*.tar, c") == ["a/x/*.tar", "a/y/*.tar", "c"]
    with pytest.raises(SourceError, match="more than 100000 places"):
        expand("{0..9999999999}")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("shard-*.tar", (0, 1, 2)), ("shard-{0001..0002}.tar", (1, 2)), ("{shard-0000,shard-0002}.tar", (0, 2))],
)
def test_a_pattern_reads_the_files_that_it_names(pattern: str, found: tuple[int, ...], tmp_path: Path) -> None:
    write_tars(str(tmp_path), pictures(3), per_tar=1)
    assert names(f"{tmp_path}/{pattern}") == [f"shard-{number:04d}.tar" for number in found]


def test_a_list_of_folders_is_one_source_and_a_missing_one_is_named(tmp_path: Path) -> None:
    one, two = (
        write_folder(str(tmp_path / "one"), pictures(1)),
        write_folder(str(tmp_path / "two"), pictures(1, first=1)),
    )
    assert names(f"{one},{two}") == ["000.png", "001.jpg"]
    with pytest.raises(SourceError, match=r"three'.*names no files"):
        names(f"{one},{tmp_path}/three")


def test_a_place_of_that_very_name_is_no_pattern(tmp_path: Path) -> None:
    write_folder(str(tmp_path / "a,b*"), pictures(2))
    assert names(str(tmp_path / "a,b*")) == ["000.png", "001.jpg"]


def test_links_to_folders_are_followed_and_circles_refused(tmp_path: Path) -> None:
    write_folder(str(tmp_path / "there"), pictures(2))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "there")
    assert names(str(tmp_path / "here")) == ["000.png", "001.jpg"]
    (tmp_path / "there/back").symlink_to(tmp_path / "here")
    with pytest.raises(SourceError, match="is a link to a folder that it lies in"):
        names(str(tmp_path / "here"))


def test_a_folder_that_cannot_be_read_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(str(tmp_path / "open"), pictures(2))
    write_folder(str(tmp_path / "closed"), pictures(2))
    listed = LocalFileSystem.ls

    def ls(self, path, **how):
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(self, path, **how)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(SourceError, match=r"closed' cannot be read \(Permission denied\)"):
        names(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "by_file", "split"),
    [
        ("train-00000-of-00002.parquet", True, "train"),
        ("data/val_0.tar", True, "validation"),
        ("Dev/0.png", False, "validation"),
        ("test.tar", True, "test"),
        ("trains-0.tar", True, None),
        ("train-station.jpg", False, None),
        ("contest/0.png", False, None),
    ],
)
def test_a_split_is_told_by_folders_and_the_names_of_shards(path: str, by_file: bool, split: str | None) -> None:
    assert split_of(path, by_file=by_file) == split


def test_a_split_is_read_alone_with_the_table_that_tells_of_all(tmp_path: Path) -> None:
    items = [(f"{split}/{name}", image, text) for split in ("train", "test") for name, image, text in pictures(2)]
    write_folder(str(tmp_path), items, table="metadata.jsonl")
    assert len(names(str(tmp_path), split="all")) == 4
    plan = plan_images(ImageSource(uri=str(tmp_path), split="train"))
    samples = [sample for shard in plan.shards for sample in shard.read()]
    assert [(s.problem, s.caption) for s in samples] == [(None, "picture number 0"), (None, "picture number 1")]
    with pytest.raises(SourceError, match=r"nothing that is named as split 'validation' \(found: train, test\)"):
        names(str(tmp_path), split="validation")


def test_a_source_that_was_read_right_keeps_its_digest(tmp_path: Path) -> None:
    write_folder(str(tmp_path), pictures(2))
    (tmp_path / "notes.md").write_text("x")
    files = [(str(file), file.stat().st_size, str(file.stat().st_mtime)) for file in sorted(tmp_path.iterdir())]
    before = hashlib.sha256(canonical_json(["folder", ["image", None], files])).hexdigest()
    assert plan_images(ImageSource(uri=str(tmp_path))).digest == before
    assert plan_images(ImageSource(uri=str(tmp_path), default_caption="x")).digest != before
    for late, listed in (("001.nef", False), ("002.nef", True)):  # beside its picture, and alone
        (tmp_path / late).write_bytes(b"x")
        stat = (tmp_path / late).stat()
        files = sorted([*files, (str(tmp_path / late), stat.st_size, str(stat.st_mtime))])
        as_before = hashlib.sha256(canonical_json(["folder", ["image", None], files])).hexdigest()
        assert (plan_images(ImageSource(uri=str(tmp_path))).digest != as_before) == listed


@pytest.mark.parametrize("late", ["x.jfif", "x.JPE", "x.zip"])
def test_a_job_that_began_without_what_is_listed_now_is_another(late: str, tmp_path: Path) -> None:
    write_folder(str(tmp_path), pictures(1))
    (tmp_path / late).write_bytes(b"x")
    files = [(str(file), file.stat().st_size, str(file.stat().st_mtime)) for file in sorted(tmp_path.iterdir())]
    before = hashlib.sha256(canonical_json(["folder", ["image", None], files])).hexdigest()
    assert plan_images(ImageSource(uri=str(tmp_path))).digest != before


def test_tables_of_this_project_are_no_part_of_a_pattern(tmp_path: Path) -> None:
    for name, file in (("a", "x"), ("b", "part-00000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{file}.parquet").write_bytes(b"")
        (tmp_path / name / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match=r"b' is a table of this project"):
        names(f"{tmp_path}/{{a,b}}")


def test_an_archive_beside_tars_counts_for_its_size(tmp_path: Path) -> None:
    write_tars(str(tmp_path), pictures(12), per_tar=12)
    content = (tmp_path / "shard-0000.tar").read_bytes()
    (tmp_path / "more.tar.gz").write_bytes(content)
    samples = [s for shard in plan_images(ImageSource(uri=str(tmp_path))).shards for s in shard.read()]
    assert samples[-1].source_uri.endswith("more.tar.gz") and abs(samples[-1].rows - 12) <= 6
    assert len(names(str(tmp_path), kind="webdataset")) == 12


def test_tars_of_depth_have_splits_and_archives_beside_them_too(tmp_path: Path) -> None:
    for name in ("train-0.tar", "test-0.tar", "train-1.tar.gz"):
        (tmp_path / name).write_bytes(tar_bytes({"0.png": b"x", "0.depth.png": b"x"}))
    with pytest.raises(SourceError, match="holds the splits train, test"):
        plan_depth(DepthSource(uri=str(tmp_path)))
    plan = plan_depth(DepthSource(uri=str(tmp_path), split="train"))
    found = [(Path(s.source_uri).name, s.problem is None) for shard in plan.shards for s in shard.read()]
    assert found == [("train-0.tar#0.png", True), ("train-1.tar.gz", False)]


def test_of_an_unsorted_tar_every_sample_counts_once(tmp_path: Path) -> None:
    items = pictures(5)
    members = {name: image for name, image, _ in items} | {f"{name[:3]}.txt": b"x" for name, *_ in items[1:]}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    samples = [s for shard in plan_images(ImageSource(uri=str(tmp_path))).shards for s in shard.read()]
    assert sum(sample.rows for sample in samples) == 5
    assert [(s.problem or "").partition(":")[0] for s in samples] == ["", *["unsorted"] * 4]
    assert len(names(str(tmp_path), default_caption="a picture")) == 5


def test_names_with_dots_count_one_by_one_in_the_ledger(tmp_path: Path) -> None:
    members = {f"i.{n:03d}.{kind}": b"x" for n in range(130) for kind in ("jpg", "txt")}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    samples = [s for shard in plan_images(ImageSource(uri=str(tmp_path))).shards for s in shard.read()]
    assert sum(s.rows for s in samples) == 130 and all((s.problem or "").startswith("dots_in_name") for s in samples)


def test_patterns_and_odd_keys_name_the_same_on_s3(bucket: str) -> None:
    for name, first in (("a%20 b#1", 0), ("a%20 b#2", 1)):
        write_parquet(f"{bucket}/{name}", pictures(1, first=first))
        write_tars(f"{bucket}/{name}", pictures(1, first=first))
    for uri in (f"{bucket}/a%20 b#*", f"{bucket}/a%20 b#{{1..2}}", f"{bucket}/a%20 b#1,{bucket}/a%20 b#2"):
        for kind in ("parquet", "webdataset"):
            shards = plan_images(ImageSource(uri=uri, kind=kind)).shards
            found = [(sample.image, sample.caption) for shard in shards for sample in shard.read()]
            assert found == [(image, text) for _, image, text in pictures(2)]
