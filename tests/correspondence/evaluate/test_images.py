"""Images are read before a matcher is asked: damaged ones are left out, and other ones are another comparison."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_core.batch.output import OutputError
from d2f_core.correspondence.evaluate.answers import claim_output
from d2f_core.correspondence.evaluate.config import EvaluateMatchesConfig, MatcherChoice
from d2f_core.correspondence.evaluate.job import load_pairs
from d2f_core.data.sources.config import PairSource
from tests.data.pair_sources import own_row, write_images, write_lines


def test_pairs_of_a_damaged_image_are_left_out_and_named(tmp_path: Path) -> None:
    """A JPEG that is cut in half tells its size; an image that is not decoded passes for a whole one."""
    made = EvaluateMatchesConfig(
        matchers=(MatcherChoice(name="a", uri="x"),), pairs=PairSource(uri=str(tmp_path)), output=str(tmp_path / "out")
    )
    write_images(tmp_path, "a.png", "b.png", "c.png", "sized.png")
    sink = io.BytesIO()
    Image.open(tmp_path / "a.png").save(sink, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(sink.getvalue()[: len(sink.getvalue()) * 2 // 3])
    wrong = {"target_image_id": "sized.png", "target_size": [60, 60]}
    rows = [own_row(), own_row(source_image_id="cut.jpg"), own_row(target_image_id="c.png"), own_row(**wrong)]
    write_lines(tmp_path / "pairs.jsonl", *rows, own_row(category=1))
    loaded = load_pairs(made)
    assert [pair.pair_id for pair in loaded.pairs] == ["a.png:b.png", "a.png:c.png"]
    assert loaded.left_out == 3 and [entry.code for entry in loaded.ledger] == [
        "bad_annotation", "undecodable", "bad_annotation"
    ]  # fmt: skip
    assert [(entry.sample_id, str(tmp_path / name) in entry.reason) for entry, name in
            zip(loaded.ledger[1:], ("cut.jpg", "sized.png"), strict=True)] == [
        ("cut.jpg:b.png", True), ("a.png:sized.png", True)
    ]  # fmt: skip


def test_answers_about_other_images_are_refused(tmp_path: Path) -> None:
    """The same pairs of another directory of images, and a file that was replaced by one as large."""
    uri = write_lines(tmp_path / "pairs.jsonl", own_row())
    for folder, seeds in (("one", (0, 1)), ("copy", (0, 1)), ("two", (0, 2))):
        (tmp_path / folder).mkdir()
        for name, seed in zip(("a.png", "b.png"), seeds, strict=True):
            colour = np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8)
            Image.fromarray(np.broadcast_to(colour, (40, 60, 3))).save(tmp_path / folder / name)

    def claim(folder: str) -> None:
        pairs = PairSource(uri=uri, images=str(tmp_path / folder))
        matchers = (MatcherChoice(name="a", uri="x"),)
        loaded = load_pairs(EvaluateMatchesConfig(matchers=matchers, pairs=pairs, output=output))
        claim_output(output, {}, loaded.pairs, images=loaded.images)

    output = str(tmp_path / "out")
    claim("one")
    claim("copy")
    with pytest.raises(OutputError, match="images was"):
        claim("two")
    replaced, other = tmp_path / "one/b.png", tmp_path / "two/b.png"
    assert replaced.stat().st_size == other.stat().st_size
    replaced.write_bytes(other.read_bytes())
    with pytest.raises(OutputError, match="images was"):
        claim("one")
