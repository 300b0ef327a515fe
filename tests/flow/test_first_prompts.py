"""What shows a few prompts reads the parts of the index that hold them, and shows the same as from all of it."""

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from d2f_core.batch import output as outputs
from d2f_core.batch.output import part_name, read_file
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.flow.evaluate.report import shown_images
from d2f_core.flow.generate.config import ContactSheetConfig
from d2f_core.flow.generate.contact_sheet import check_contact_sheet, make_contact_sheet
from d2f_core.flow.generate.first_prompts import first_prompts, rows_of

STEPS = (1, 2)


def write_generation(uri: Path, prompts: int, chunk: int, *, first: int = 0) -> str:
    """A finished generation: per chunk all its prompts at one number of steps, then at the next; the second failed."""
    uri.mkdir()
    Image.new("RGB", (8, 8), "red").save(uri / "red.png")
    files = []
    for start in range(0, prompts, chunk):
        numbers = range(first + start, first + min(start + chunk, prompts))
        rows = [
            {"sample_id": f"id{number}", "prompt": f"thing {number}", "steps": steps, "num_evaluations": steps,
             "image_uri": None if (number, steps) == (1, 1) else str(uri / "red.png"), "model_uri": "m", "solver": "s"}
            for steps in STEPS for number in numbers
        ]  # fmt: skip
        files.append(write_part(str(uri), part_name(start // chunk), pa.Table.from_pylist(rows)))
    write_manifest(str(uri), Manifest(kind="generations", files=tuple(files), fingerprint={"steps": list(STEPS)}))
    return str(uri)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Places of the parts that are read; at most two ahead."""
    places: list[str] = []
    monkeypatch.setattr(outputs, "read_file", lambda uri, file: places.append(file.path) or read_file(uri, file))
    monkeypatch.setattr(outputs, "READ_THREADS", 2)
    return places


def test_first_prompts_and_their_rows_come_whole_from_chunks_of_any_size(tmp_path: Path) -> None:
    one, other = (write_generation(tmp_path / f"{chunk}", 12, chunk) for chunk in (2, 5))
    assert first_prompts(one, 5) == first_prompts(other, 5) == {f"id{n}": f"thing {n}" for n in range(5)}
    assert len(first_prompts(one, 99)) == 12
    for uri in (one, other):
        rows = rows_of(uri, ["id4", "id0"], ("image_uri",)).to_pylist()
        assert sorted((row["sample_id"], row["steps"]) for row in rows) == [
            ("id0", 1), ("id0", 2), ("id4", 1), ("id4", 2)
        ]  # fmt: skip


def test_a_report_reads_the_first_parts_of_each_index_alone(tmp_path: Path, read: list[str]) -> None:
    outputs = {role: write_generation(tmp_path / role, 80, 2) for role in ("candidate", "champion")}
    shown = shown_images(outputs, 4)
    assert len(read) < 20, "of 80 parts"
    assert [each.prompt for each in shown] == [f"thing {number}" for number in range(4)]
    for each in shown:
        assert {role: len(images) for role, images in each.images.items()} == {"candidate": 2, "champion": 2}
    assert shown[1].images["champion"][0] is None and str(shown[1].images["champion"][1]).startswith("data:image/webp")
    with pytest.raises(ValueError, match=r"base: .* has no row of sample 'id0'\. Generate from one prompt file"):
        shown_images({**outputs, "base": write_generation(tmp_path / "base", 4, 2, first=50)}, 2)


def test_a_contact_sheet_reads_the_first_parts_of_each_index_alone(tmp_path: Path, read: list[str]) -> None:
    generations = tuple(write_generation(tmp_path / name, 80, 2) for name in ("a", "b"))
    config = ContactSheetConfig(generations=generations, output=str(tmp_path / "sheets/x.png"), max_rows=4, cell=20)
    assert Image.open(make_contact_sheet(check_contact_sheet(config))).height > 80
    assert len(read) < 20, "of 160 parts"
    stranger = write_generation(tmp_path / "c", 4, 2, first=50)
    with pytest.raises(ValueError, match=r"c' has none of the first prompts of .*a'\. Compare generations"):
        check_contact_sheet(ContactSheetConfig(generations=(*generations, stranger), output=config.output))
