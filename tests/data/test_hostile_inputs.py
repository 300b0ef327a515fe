"""Files that were made to hurt: each is refused or set aside with a reason, quickly, and in little memory.

Time is processor time of a process of its own, memory what that process grew by at its largest.
"""

from pathlib import Path

import numpy as np
import pytest

from d2f_core.data.image_headers import BadImageError
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import prepare_image
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import Sample, SourceError
from tests.data import hostile_pictures, hostile_sources
from tests.data.measured import Cost, measure
from tests.data.pictures import file_bytes, pixels, write_folder

pytestmark = pytest.mark.timeout(300)
RULES = ImageRules(resolution=16, min_side=8, max_pixels=50_000_000, decoding="srgb")
SECONDS, MEMORY = 3.0, 200 * 2**20
"""A second, with room for a slow machine; memory needs no such room."""


def check(cost: Cost) -> None:
    assert cost.seconds < SECONDS and cost.memory < MEMORY, f"{cost.seconds:.2f} s, {cost.memory / 2**20:.0f} MiB"


def outcome(file: Path) -> str | np.ndarray:
    """The pixels, or the reason."""
    try:
        return prepare_image(file.read_bytes(), RULES).pixels
    except BadImageError as error:
        return str(error)


def read(uri: str) -> list[tuple[str, str]] | str:
    """Of each sample its URI and what becomes of it, as an encode job goes about it, never keeping a second one."""
    try:
        shards = plan_images(ImageSource(uri=uri)).shards
        return [(sample.source_uri, fate(sample)) for shard in shards for sample in shard.read()]
    except SourceError as error:
        return f"SourceError: {error}"


def fate(sample: Sample) -> str:
    if sample.image is None:
        return sample.problem or "no reason"
    try:
        prepare_image(sample.image, RULES)
    except BadImageError as error:
        return str(error)
    return f"fine: {sample.caption}"


def open_weights(file: str) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as weights:
            return str([weights.get_tensor(name) for name in weights.keys()])
    except SafetensorError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("name", hostile_pictures.REFUSED)
def test_a_hostile_picture_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    make, reason = hostile_pictures.REFUSED[name]
    (tmp_path / "file").write_bytes(make())
    cost = measure(outcome, tmp_path / "file")
    assert isinstance(cost.answer, str) and cost.answer.startswith(reason), cost.answer
    check(cost)


@pytest.mark.parametrize("name", hostile_pictures.PASSED_OVER)
def test_of_a_file_with_hostile_extras_only_the_picture_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(hostile_pictures.PASSED_OVER[name]())
    cost = measure(outcome, tmp_path / "file")
    kind = name.partition("-")[0] if not name.startswith(("zip", "html")) else name.rpartition("-")[2]
    plain = prepare_image(file_bytes(hostile_pictures.PICTURE, kind.upper()), RULES).pixels
    np.testing.assert_array_equal(cost.answer, plain)
    check(cost)


@pytest.mark.parametrize("name", hostile_sources.TARS)
def test_a_hostile_tar_ends_in_the_ledger(name: str, tmp_path: Path) -> None:
    make, reason = hostile_sources.TARS[name]
    hostile_sources.write_tar(tmp_path / "a.tar", make())
    cost = measure(read, str(tmp_path))
    bad = [what for _, what in cost.answer if not what.startswith("fine")]
    assert bad and bad[-1].startswith(reason) if reason else not bad, cost.answer
    for uri, what in cost.answer:
        (uri + what).encode()  # a ledger can hold it
    check(cost)


def test_what_comes_before_the_hostile_member_is_kept(tmp_path: Path) -> None:
    for name in ("size-of-8-exabytes", "cut-off-in-a-header", "header-overwritten"):
        hostile_sources.write_tar(tmp_path / "a.tar", hostile_sources.TARS[name][0]())
        fates = [what for _, what in read(str(tmp_path))]
        assert fates[0] == "fine: a caption" and fates[-1].startswith("damaged_archive: ")


@pytest.mark.parametrize("name", hostile_sources.PARQUETS)
def test_a_hostile_parquet_file_is_refused_or_ends_in_the_ledger(name: str, tmp_path: Path) -> None:
    make, reason = hostile_sources.PARQUETS[name]
    (tmp_path / "a.parquet").write_bytes(make())
    cost = measure(read, str(tmp_path))
    if isinstance(cost.answer, str):
        assert cost.answer.startswith(reason), cost.answer
    else:
        bad = [what for _, what in cost.answer if not what.startswith("fine")]
        assert bad and all(what.startswith(reason) for what in bad) if reason else not bad, cost.answer[:3]
    check(cost)


def check_artifact(file: str) -> str:
    from d2f_core.model.artifact_files import ArtifactError, check_files

    try:
        check_files(Path(file).parents[1])
    except ArtifactError as error:
        return f"refused: {error}"
    return "accepted"


@pytest.mark.parametrize("reader", [check_artifact, open_weights])
@pytest.mark.parametrize("name", hostile_sources.SAFETENSORS)
def test_hostile_weights_are_refused_by_our_check_and_by_the_library(name: str, reader, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(hostile_sources.SAFETENSORS[name]())
    cost = measure(reader, str(file))
    assert cost.answer.startswith("refused"), cost.answer
    check(cost)


def folder_with_pipe(path: Path) -> str:
    import os

    os.mkfifo(path / "x.png")
    return "no_image: x.png is no plain file"


def folder_with_endless_device(path: Path) -> str:
    (path / "x.png").symlink_to("/dev/zero")
    return "no_image: x.png is no plain file"


def folder_with_endless_caption(path: Path) -> str:
    (path / "x.png").write_bytes(file_bytes(pixels(0)))
    (path / "x.txt").symlink_to("/dev/zero")
    return "bad_caption: x.txt is no plain file"


def folder_with_a_hole(path: Path) -> str:
    with (path / "x.png").open("wb") as file:
        file.truncate(2**40)  # a terabyte that takes up no disk
    return "too_large: 1,099,511,627,776 bytes"


def folder_with_a_name_that_is_no_text(path: Path) -> str:
    (path / "x\udcff.gif").write_bytes(b"GIF89a")
    return "undecodable: cut off within its header"


def folder_with_a_deep_table(path: Path) -> str:
    (path / "000.txt").unlink()
    (path / "metadata.jsonl").write_bytes(b'{"file_name": ' + b"[" * 50_000)
    return "SourceError"


def folder_whose_table_climbs(path: Path) -> str:
    (path / "000.txt").unlink()
    lines = ['{"file_name": "000.png", "text": "a"}', '{"file_name": "../../../etc/passwd", "text": "b"}']
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return "no_image: the file is not there"


@pytest.mark.parametrize(
    "make",
    [
        folder_with_pipe,
        folder_with_endless_device,
        folder_with_endless_caption,
        folder_with_a_hole,
        folder_with_a_name_that_is_no_text,
        folder_with_a_deep_table,
        folder_whose_table_climbs,
    ],
    ids=lambda make: make.__name__.removeprefix("folder_"),
)
def test_a_hostile_folder_is_refused_or_ends_in_the_ledger(make, tmp_path: Path) -> None:
    write_folder(str(tmp_path), [("000.png", file_bytes(pixels(0)), "a")])
    reason = make(tmp_path)
    cost = measure(read, str(tmp_path))
    if reason == "SourceError":
        assert cost.answer.startswith(reason)
    else:
        bad = [(uri, what) for uri, what in cost.answer if not what.startswith("fine")]
        assert len(cost.answer) == 2 and len(bad) == 1 and bad[0][1].startswith(reason), cost.answer
        bad[0][0].encode()
    check(cost)
