"""The emoji set: real drawings, the same captions in both styles, the same bytes every time."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.data.datasets.emoji import drawings, make_dataset, render, subset_names
from d2f_core.data.datasets.emoji_names import core_names, few_names, starter_names
from d2f_core.data.manifest import ManifestError
from d2f_core.data.schema import IMAGE_SCHEMA, check_schema, sample_id


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_both_styles_draw_every_emoji_of_the_core_set():
    names = core_names()
    assert len(names) == len(set(names)) == len(subset_names("core"))


def test_the_starter_set_is_part_of_the_core_set():
    names = starter_names()
    assert len(set(names)) == len(names) == 120 and set(names) < set(core_names())
    assert len(set(few_names())) == len(few_names()) == 32 and set(few_names()) < set(names)


def test_all_has_every_emoji_that_both_styles_draw_and_no_skin_tones():
    names = subset_names("all")
    assert len(names) > 1800 and set(core_names()) < set(names)
    assert not any("skin tone" in name for name in names)


def test_a_drawing_is_rendered_at_any_size_on_white():
    for size in (32, 64, 200):
        picture = shown(render(drawings("twemoji")["red apple"].read_text(), size))
        assert picture.shape == (size, size, 3)
        assert (picture[0, 0] == 255).all() and picture[size // 2, size // 2, 0] > 180


def test_a_drawing_can_fill_the_picture_whatever_margins_it_came_with():
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
    svg = head + '<rect x="40" y="30" width="20" height="10"/></svg>'
    dark = shown(render(svg, 40, "drawing"))[..., 0] < 128
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert columns[0] <= 1 and columns[-1] >= 38
    assert abs(rows[0] - 10) <= 1 and abs(rows[-1] - 29) <= 1
    for name in ("red apple", "pencil", "giraffe", "snowflake"):
        for style in ("twemoji", "openmoji"):
            picture = shown(render(drawings(style)[name].read_text(), 64, "drawing"))
            assert picture.shape == (64, 64, 3)
            ink = (picture < 250).any(-1)
            assert max(np.ptp(np.flatnonzero(ink.any(axis))) for axis in (0, 1)) >= 58


def test_an_empty_drawing_keeps_its_canvas():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"></svg>'
    assert (shown(render(svg, 32, "drawing")) == 255).all()


def test_a_drawing_that_is_not_square_is_centred():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 10 40 20"><rect y="10" width="40" height="20"/></svg>'
    dark = shown(render(svg, 40))[..., 0] < 128
    rows = np.flatnonzero(dark.any(axis=1))
    assert dark.any(axis=0).all() and (rows[0], rows[-1]) == (10, 29)


def test_a_table_has_both_styles_with_the_same_captions(tmp_path):
    manifest, written = make_dataset(MakeDatasetConfig(output=str(tmp_path), style="both", size=16))
    rows = [row for file in manifest.files for row in pq.read_table(tmp_path / file.path).to_pylist()]
    check_schema(pq.read_schema(tmp_path / manifest.files[0].path), IMAGE_SCHEMA, where="table")
    by_style = {style: {row["caption"].removesuffix(f", {style} style") for row in rows if style in row["caption"]}
                for style in ("twemoji", "openmoji")}  # fmt: skip
    assert written and by_style["twemoji"] == by_style["openmoji"] == set(core_names())
    assert all(row["sample_id"] == sample_id(row["image"], row["caption"]) for row in rows)
    assert [row["sample_id"] for row in rows] == sorted(row["sample_id"] for row in rows)
    assert len({row["image"] for row in rows}) == len(rows) == manifest.counts["written"]


def test_the_same_command_writes_the_same_bytes_and_then_nothing(tmp_path):
    one, two = (MakeDatasetConfig(output=str(tmp_path / name), size=16) for name in ("one", "two"))
    manifest, _ = make_dataset(one)
    assert make_dataset(two)[0].digest == manifest.digest
    assert make_dataset(one) == (manifest, False)


def test_another_table_at_the_output_is_refused(tmp_path):
    make_dataset(MakeDatasetConfig(output=str(tmp_path), size=16))
    with pytest.raises(ManifestError, match=r"'size': 16.*asked for.*'size': 32"):
        make_dataset(MakeDatasetConfig(output=str(tmp_path), size=32))


@pytest.mark.parametrize("field", [{"output": ""}, {"size": 8}, {"size": 4096}])
def test_a_config_that_cannot_work_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        MakeDatasetConfig(**field)


def test_the_splits_share_no_drawing_and_make_up_the_whole(tmp_path):
    def made(split):
        config = MakeDatasetConfig(output=str(tmp_path / split), subset="starter", split=split, size=16)
        manifest, _ = make_dataset(config)
        (part,) = manifest.files
        return pq.read_table(tmp_path / split / part.path).column("caption").to_pylist(), manifest.inputs

    (whole, plain), (train, its), (test, _) = (made(split) for split in ("whole", "train", "test"))
    few = {f"{name}, twemoji style" for name in few_names()}
    assert test == [caption for caption in whole[::8] if caption not in few] and len(test) < len(whole[::8])
    assert train == [caption for caption in whole if caption not in test]
    assert "split" not in plain and its["split"] == "train", "tables from before there were splits stay what they are"
