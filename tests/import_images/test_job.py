"""From a folder of photos to two image tables, a list of what looks alike, and a page to look at."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from d2f_core.batch.output import OutputError
from d2f_core.data.image_decoding import decode
from d2f_core.data.images import prepare_decoded
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.sample import Sample
from d2f_core.identity import identity_values
from d2f_core.import_images.config import ImportImagesConfig, ImportImagesError
from d2f_core.import_images.job import check_import, import_images
from d2f_core.import_images.parting import Side
from d2f_core.import_images.spec import ImportSpec
from tests.data.profiles import DISPLAY_P3, SRGB, matrix_profile
from tests.flow.here import here
from tests.import_images.photos import jpeg, photo, put, write_photos
from tests.model.tiny_sd import write_tiny

COPY = 7
"""Number of the photo of which there is a smaller copy."""


def settings(source: Path, output: Path, **changes: object) -> ImportImagesConfig:
    usual: dict[str, object] = {"min_side": 32, "held_out_share": 0.25, "rows_per_part": 8}
    return ImportImagesConfig(source=ImageSource(uri=str(source)), output=str(output), **{**usual, **changes})  # pyright: ignore[reportArgumentType]


def run(config: ImportImagesConfig) -> dict[Side, Manifest]:
    with here():
        return import_images(check_import(config))


def rows(output: Path, side: str) -> list[dict]:
    files = sorted((output / side).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photos, one of them again as a smaller copy and as the same file, and two that cannot be used."""
    home = write_photos(tmp_path_factory.mktemp("photos") / "in", 30, scale=2)
    image, caption = photo(COPY, scale=2)
    put(home, "photo9000-small", image.resize([side * 2 // 3 for side in image.size]), caption, quality=70)
    put(home, "photo9001-again", image, caption)
    put(home, "photo9002-tiny", image.resize((20, 20)), caption)
    (home / "photo9003-broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (home / "photo9003-broken.txt").write_text("nothing")
    return home


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("photos") / "out"
    run(settings(folder, output, max_quarantined_share=0.1))
    return output


def test_every_usable_photo_is_on_one_side_and_the_others_are_in_the_ledger(imported: Path) -> None:
    train, test = rows(imported, "train"), rows(imported, "test")
    assert len(train) + len(test) == 31 and 3 <= len(test) <= 14
    assert {row["sample_id"] for row in train}.isdisjoint(row["sample_id"] for row in test)
    left_out = {Path(bad.source_uri).stem: bad.code for bad in read_quarantine(str(imported))}
    assert left_out == {
        "photo9001-again": "duplicate", "photo9002-tiny": "too_small", "photo9003-broken": "undecodable",
    }  # fmt: skip


def test_an_equal_file_is_in_the_ledger_with_the_place_of_the_one_that_is_kept(tmp_path: Path) -> None:
    """Also where files are stored anew, under other ids, and where the kept one of a chunk is another's duplicate."""
    home = write_photos(tmp_path / "in", 4, scale=2)
    for number, of in enumerate([3, 3, 0, 0]):
        put(home, f"photo9{number}", *photo(of, scale=2))
    for rows_per_part in (8, 2):
        config = settings(home, tmp_path / f"out{rows_per_part}", short_side=64, rows_per_part=rows_per_part)
        run(config)
        left_out = {Path(bad.source_uri).stem: bad.reason for bad in read_quarantine(config.output)}
        kept = {"photo90": 3, "photo91": 3, "photo92": 0, "photo93": 0}
        assert left_out == {name: f"duplicate: of {home}/photo{of:04d}.jpg" for name, of in kept.items()}


def test_originals_that_are_too_large_for_one_piece_are_written_in_several_and_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import d2f_core.batch.chunks as chunks
    import d2f_core.batch.table_job as table_job

    home = write_photos(tmp_path / "in", 12)
    config = settings(home, tmp_path / "out", short_side=0, rows_per_part=6)
    sizes = [file.stat().st_size for file in sorted(home.glob("*.jpg"))]
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", sum(sizes[:2]) + 1)
    with here(), pytest.MonkeyPatch.context() as patch:
        job = check_import(config).table
        table_job.claim_output(job.spec)
        made = list(table_job.run_chunks(job, {0: {}, 1: {}}))
        taken = [record.samples for record in made]
        assert taken == [3, 2, 1, 3, 2, 1] and [record.last for record in made[:3]] == [False, False, True]
        for name in ("000000-00000", "000001-00001"):
            (tmp_path / f"out/_all/_progress/{name}.json").unlink()
        patch.setattr(table_job, "finish_table", lambda spec, records: sorted(record.samples for record in records))
        assert table_job.make_table(job) == sorted(taken)
    names = [Path(row["source_uri"]).stem for side in run(config) for row in rows(tmp_path / "out", side)]
    assert sorted(names) == [f"photo{number:04d}" for number in range(12)]


def test_an_unfinished_import_with_other_settings_is_refused_at_the_prompt(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="more than max_quarantined_share"):
        run(settings(folder, tmp_path / "out", max_quarantined_share=0.0))
    check_import(config)
    with pytest.raises(OutputError, match=r"is an unfinished table of another job: rows_per_part was 8, now 9"):
        check_import(settings(folder, tmp_path / "out", rows_per_part=9))


def test_a_smaller_copy_is_listed_and_lies_on_the_side_of_its_original(imported: Path) -> None:
    (line,) = map(json.loads, (imported / "duplicates.jsonl").read_text().splitlines())
    assert [Path(line[name]).stem for name in ("kept", "alike")] == [f"photo{COPY:04d}", "photo9000-small"]
    assert line["bits"] <= 4 and not line["dropped"]
    sides = [
        {Path(row["source_uri"]).stem for row in rows(imported, side)} & {f"photo{COPY:04d}", "photo9000-small"}
        for side in ("train", "test")
    ]
    assert sorted(map(len, sides)) == [0, 2]


def test_the_id_is_that_of_the_stored_bytes_by_which_latents_are_known(imported: Path) -> None:
    for row in rows(imported, "train"):
        assert row["sample_id"] == sample_id(row["image"], row["caption"])
        assert Image.open(io.BytesIO(row["image"])).size == (row["width"], row["height"])


def test_one_at_a_time_or_all_at_once_the_sides_are_the_same(folder: Path, imported: Path, tmp_path: Path) -> None:
    run(settings(folder, tmp_path / "out", max_quarantined_share=0.1, rows_per_part=3))
    for side in ("train", "test"):
        assert {row["sample_id"] for row in rows(tmp_path / "out", side)} == {
            row["sample_id"] for row in rows(imported, side)
        }


def test_dropped_copies_are_on_no_side_and_the_largest_stays(folder: Path, tmp_path: Path) -> None:
    run(settings(folder, tmp_path / "out", max_quarantined_share=0.1, near_duplicates="drop"))
    names = {Path(row["source_uri"]).stem for side in ("train", "test") for row in rows(tmp_path / "out", side)}
    assert f"photo{COPY:04d}" in names and "photo9000-small" not in names and len(names) == 30


def test_a_resolution_makes_squares_of_one_size_as_autoencoders_are_trained_on(folder: Path, tmp_path: Path) -> None:
    made = run(settings(folder, tmp_path / "out", resolution=64, max_quarantined_share=0.1))
    assert made["train"].fingerprint == {"height": 64, "width": 64}
    for row in rows(tmp_path / "out", "train"):
        assert (row["width"], row["height"]) == (64, 64) and min(row["original_width"], row["original_height"]) >= 64


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_as_many_are_held_out_as_an_evaluation_needs(folder: Path, tmp_path: Path, share: float) -> None:
    config = settings(folder, tmp_path / "out", held_out_share=share, held_out_least=15, max_quarantined_share=0.1)
    made = run(config)
    assert 15 <= made["test"].num_rows <= 16 and made["train"].num_rows + made["test"].num_rows == 31


def test_no_more_is_held_out_than_trained_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ImportImagesError, match=r"held_out_least=20 take 2\d of 31 images, more than are left"):
        run(settings(folder, tmp_path / "out", held_out_least=20, max_quarantined_share=0.1))


@pytest.mark.parametrize(
    ("image", "kept"),
    [
        (jpeg(photo(0)[0]), True),
        (jpeg(photo(0)[0].convert("L")), True),
        (jpeg(photo(0)[0], exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"), False),
        (jpeg(photo(0, scale=2)[0]), False),
    ],
    ids=["plain", "grey", "turned", "large"],
)
def test_a_file_is_stored_as_it_is_unless_its_pixels_change(image: bytes, kept: bool, tmp_path: Path) -> None:
    home = write_photos(tmp_path / "in", 1, first=3)
    (home / "it.jpg").write_bytes(image)
    (home / "it.txt").write_text("it")
    run(settings(home, tmp_path / "out", short_side=64, held_out_share=0))
    (row,) = (row for row in rows(tmp_path / "out", "train") if row["caption"] == "it")
    assert (row["image"] == image) == kept
    stored = Image.open(io.BytesIO(row["image"]))
    assert stored.format == "JPEG" and stored.getexif().get(0x0112, 1) == 1 and min(stored.size) == 64
    turned = row["height"] > row["width"]
    assert turned == (b"Exif" in image)


@pytest.mark.parametrize("profile", [matrix_profile(SRGB), matrix_profile(DISPLAY_P3)], ids=["srgb", "display-p3"])
def test_another_colour_space_is_stored_as_srgb_and_srgb_as_it_is(profile: bytes, tmp_path: Path) -> None:
    home = write_photos(tmp_path / "in", 1, first=3)
    file = put(home, "it", Image.new("RGB", (64, 64), (200, 60, 40)), "it", icc_profile=profile)
    run(settings(home, tmp_path / "out", held_out_share=0))
    (row,) = (row for row in rows(tmp_path / "out", "train") if row["caption"] == "it")
    assert (row["image"] == file.read_bytes()) == (profile == matrix_profile(SRGB))
    red, green, blue = np.asarray(Image.open(io.BytesIO(row["image"])))[30, 30]
    wanted = (200, 60, 40) if profile == matrix_profile(SRGB) else (217, 42, 23)
    assert np.abs(np.array([red, green, blue], int) - wanted).max() <= 4


def test_transparency_is_stored_as_what_lies_behind_it_without_loss(tmp_path: Path) -> None:
    home = write_photos(tmp_path / "in", 1, first=3)
    image = photo(0)[0].convert("RGBA")
    image.putalpha(128)
    image.save(home / "it.png", pnginfo=PngImagePlugin.PngInfo())
    (home / "it.txt").write_text("it")
    run(settings(home, tmp_path / "out", held_out_share=0))
    (row,) = (row for row in rows(tmp_path / "out", "train") if row["caption"] == "it")
    stored = Image.open(io.BytesIO(row["image"]))
    wanted = np.asarray(photo(0)[0], float) * 128 / 255 + 255 * (1 - 128 / 255)
    assert stored.format == "PNG" and stored.mode == "RGB" and np.abs(np.asarray(stored, float) - wanted).max() <= 1


def lossless_webp() -> bytes:
    sink = io.BytesIO()
    photo(0)[0].save(sink, "WEBP", lossless=True, icc_profile=matrix_profile(DISPLAY_P3))
    return sink.getvalue()


def test_a_lossless_file_with_a_profile_stays_lossless(tmp_path: Path) -> None:
    home = write_photos(tmp_path / "in", 1, first=3)
    (home / "it.webp").write_bytes(lossless_webp())
    (home / "it.txt").write_text("it")
    run(settings(home, tmp_path / "out", held_out_share=0))
    (row,) = (row for row in rows(tmp_path / "out", "train") if row["caption"] == "it")
    assert Image.open(io.BytesIO(row["image"])).format == "PNG"


def sides(output: Path) -> dict[str, str]:
    return {Path(row["source_uri"]).stem: side for side in ("train", "test") for row in rows(output, side)}


def test_a_photo_is_on_the_same_side_at_any_size_with_any_caption_and_in_other_company(tmp_path: Path) -> None:
    home = write_photos(tmp_path / "in", 60, scale=2)
    run(settings(home, tmp_path / "one"))
    for text in list(home.glob("*.txt"))[::2]:
        text.write_text("another caption")
    write_photos(home, 40, first=60, scale=2)
    run(settings(home, tmp_path / "other", resolution=64))
    one, other = sides(tmp_path / "one"), sides(tmp_path / "other")
    assert {name: other[name] for name in one} == one and set(one.values()) == {"train", "test"}


def test_a_finished_import_serves_whoever_asks_for_less_and_not_whoever_asks_for_more(
    folder: Path, tmp_path: Path
) -> None:
    config = settings(folder, tmp_path / "out", max_quarantined_share=0.1, held_out_least=10)
    made = run(config)
    assert run(dataclasses.replace(config, held_out_least=0)) == made
    with pytest.raises(OutputError, match=r"images held out, and held_out_least=31 asks for more"):
        check_import(dataclasses.replace(config, held_out_least=31))


def test_tables_that_are_gone_are_made_again(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "out", max_quarantined_share=0.1)
    made = run(config)
    shutil.rmtree(tmp_path / "out/train")
    assert run(config) == made
    for side in ("train", "test"):
        shutil.rmtree(tmp_path / "out" / side)
    assert run(dataclasses.replace(config, held_out_share=0.4))["test"].num_rows > made["test"].num_rows


@pytest.mark.parametrize("drop", ["keep", "drop"])
def test_photos_that_all_look_alike_are_not_parted_and_the_reason_is_said(tmp_path: Path, drop: str) -> None:
    home = tmp_path / "in"
    home.mkdir()
    for number in range(5):
        put(home, f"it{number}", photo(3, scale=2)[0].resize((100 + number, 80)), "it")
    with pytest.raises(ImportImagesError, match=r"up to 5 of them look alike and stay together"):
        run(settings(home, tmp_path / "out", near_duplicates=drop))
    assert run(settings(home, tmp_path / "out", near_duplicates=drop, held_out_share=0))["train"].num_rows == (
        5 if drop == "keep" else 1
    )


def test_photos_without_captions_are_in_the_ledger_or_have_the_one_that_is_given(tmp_path: Path) -> None:
    home = write_photos(tmp_path / "in", 12)
    for text in home.glob("photo000[0-3].txt"):
        text.unlink()
    config = settings(home, tmp_path / "out", max_quarantined_share=0.5)
    assert sum(table.num_rows for table in run(config).values()) == 8
    source = dataclasses.replace(config.source, default_caption="a photo")
    config = dataclasses.replace(config, source=source, output=str(tmp_path / "with"))
    assert sum(table.num_rows for table in run(config).values()) == 12


def test_a_base_that_cannot_count_tokens_is_refused_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "sd15")
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        check_import(settings(folder, tmp_path / "out", base=str(base)))


def test_a_second_run_changes_nothing_and_another_import_is_refused(folder: Path, imported: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in imported.rglob("*") if file.is_file()}
    run(settings(folder, imported, max_quarantined_share=0.1))
    assert before == {file: file.stat().st_mtime_ns for file in imported.rglob("*") if file.is_file()}
    with pytest.raises(OutputError, match=r"images of another import: near_distance was 4, now 2"):
        check_import(settings(folder, imported, near_distance=2))


def test_a_run_that_was_killed_between_both_tables_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    import d2f_core.import_images.job as job

    config, write = settings(folder, tmp_path / "out", max_quarantined_share=0.1), job._write_side

    def killed(*args: object) -> Manifest:
        if args[-1] == "test":
            raise KeyboardInterrupt
        return write(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(job, "_write_side", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    before = read_manifest(f"{config.output}/train")
    made = run(config)
    assert made["train"] == before and made["test"].num_rows and not (tmp_path / "out/_all").exists()


def test_the_page_shows_what_came_in(imported: Path) -> None:
    page = (imported / "report.html").read_text()
    assert not re.search(r"<script|https?://", page)
    for text in ("34</b>read", "too_small", "photo9003-broken.jpg", "1 group,", "Blurriest", "captions"):
        assert text in page.replace("Captions", "captions"), text
    summary = json.loads((imported / "summary.json").read_text())
    assert summary["read"] == 34 and summary["train"] + summary["test"] == 31
    assert summary["left_out"] == {"duplicate": 1, "too_small": 1, "undecodable": 1}
    assert sum(bar["count"] for bar in summary["sides"]) == sum(bar["count"] for bar in summary["aspects"]) == 31


def test_a_photo_above_pillows_limit_of_pixels_is_made_smaller_and_stays_a_jpeg(tmp_path: Path, monkeypatch) -> None:
    spec = ImportSpec(config=settings(tmp_path, tmp_path, short_side=32, max_pixels=7000), fingerprint={}, inputs={})
    image, sink = photo(1, scale=4)[0], io.BytesIO()
    image.save(sink, "MPO", save_all=True, append_images=[image])  # as phones write it, with a second picture behind
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    for source in (jpeg(image), sink.getvalue()):
        row = spec.prepare(Sample(source_uri="x", image=source, caption="x"))
        assert row["original_width"] * row["original_height"] > 2 * 40_000 > row["width"] * row["height"]
        assert min(row["width"], row["height"]) == 32 and row["image"][:3] == b"\xff\xd8\xff"


def test_squares_are_cut_where_the_crop_says(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "out", resolution=32, crop="top")
    image = photo(1, scale=2)[0]
    decoded = decode(jpeg(image), config.rules)
    assert image.height > image.width and decoded.image.size == image.size
    kept = prepare_decoded(decoded, config.rules)
    assert kept.crop == (0, 0, image.width, image.width)
    sample = Sample(source_uri="x", image=jpeg(image), caption="x")
    made = np.asarray(
        Image.open(io.BytesIO(ImportSpec(config=config, fingerprint={}, inputs={}).prepare(sample)["image"]))
    )
    assert np.abs(made.astype(int) - kept.pixels).mean() < 3
    assert identity_values(config.rules)["crop"] == "top"
    assert "crop" not in identity_values(settings(folder, tmp_path).rules)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": 16}, r"short_side=16 is below min_side=32"),
        ({"near_distance": 11}, r"near_distance=11 must lie in \[-1, 10\]"),
        ({"held_out_share": 1.0}, r"held_out_share=1 leaves no image to train on"),
        ({"resolution": -1}, r"resolution=-1 must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImportImagesError, match=message):
        settings(tmp_path, tmp_path / "out", **changes)


def test_an_output_that_holds_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files: notes\.txt"):
        check_import(settings(folder, tmp_path))
