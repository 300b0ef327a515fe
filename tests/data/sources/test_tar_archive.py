"""A damaged tar counts for what it held, so that the limit on unusable samples stops the job."""

from pathlib import Path

import pytest

from d2f_core.data.sources.config import DepthSource, ImageSource
from d2f_core.data.sources.depth import plan_depth
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import Sample
from tests.data.pictures import file_bytes, pictures, pixels, tar_bytes, write_tars


def samples_of(uri: str, **how) -> list[Sample]:
    return [sample for shard in plan_images(ImageSource(uri=uri, **how)).shards for sample in shard.read()]


def counts(samples: list[Sample]) -> tuple[int, int]:
    """Good samples and unusable ones."""
    return sum(not sample.problem for sample in samples), sum(s.rows for s in samples if s.problem)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.6])
def test_what_a_cut_tar_held_is_estimated_from_its_siblings(share: float, tmp_path: Path) -> None:
    write_tars(str(tmp_path), pictures(48), per_tar=12)
    tar = tmp_path / "shard-0001.tar"
    tar.write_bytes(tar.read_bytes()[: int(tar.stat().st_size * share)])
    good, bad = counts(samples_of(str(tmp_path)))
    assert abs(good + bad - 48) <= 6 and bad > 0


def test_a_tar_with_a_damaged_middle_is_estimated_from_its_own_size(tmp_path: Path) -> None:
    write_tars(str(tmp_path), pictures(40), per_tar=40)
    tar = tmp_path / "shard-0000.tar"
    content = bytearray(tar.read_bytes())
    at = content.index(b"010.jpg")
    content[at : at + 512] = b"x" * 512
    tar.write_bytes(content)
    samples = samples_of(str(tmp_path))
    assert counts(samples)[0] == 10 and abs(counts(samples)[1] - 30) <= 8
    assert "by its size it held about" in (samples[-1].problem or "")


def test_a_whole_tar_smaller_than_its_siblings_loses_nothing(tmp_path: Path) -> None:
    write_tars(str(tmp_path), pictures(26), per_tar=12)
    assert counts(samples_of(str(tmp_path))) == (26, 0)


def test_tars_of_depth_are_estimated_likewise(tmp_path: Path) -> None:
    png = file_bytes(pixels(0))
    for name in "ab":
        members = {f"{n}.{kind}": png for n in range(10) for kind in ("png", "depth.png")}
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 20])
    shards = plan_depth(DepthSource(uri=str(tmp_path))).shards
    assert abs(sum(sample.rows for shard in shards for sample in shard.read()) - 20) <= 5
