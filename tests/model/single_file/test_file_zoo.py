"""Every kind of single file that people have is read whole or refused with its reason; none is half read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.importing.config import ImportCheckpointConfig, ImportCheckpointError
from d2f_core.model.importing.job import check_checkpoint_import
from tests.model.single_file.file_zoo import ROWS, File, Tensors, table, write
from tests.model.single_file.files import put_configs_beside, tensors_of, write_file
from tests.model.tiny_sd import write_tiny

FAMILIES = ("sd15", "sd21", "sdxl")
DOCS = Path(__file__).parents[3] / "docs/checkpoint_files.md"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("zoo")
    return {name: write_tiny(place / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def checkpoints(bases: dict[str, Path]) -> dict[str, Tensors]:
    made = {name: load_file(write_file(base, base.with_suffix(".safetensors"))) for name, base in bases.items()}
    return {name: {key: t for key, t in all_.items() if key != "v_pred"} for name, all_ in made.items()}


@pytest.mark.parametrize("row", [each for each in ROWS if not each.why], ids=lambda each: each.name)
def test_it_is_read_whole_as_what_it_says(
    row: File, bases: dict[str, Path], checkpoints: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    file, base = write(row, checkpoints[row.family], tmp_path), bases[row.family]
    put_configs_beside(base, file, scheduler=False)
    check_checkpoint_import(ImportCheckpointConfig(source=str(file), output=str(tmp_path / "out")))
    found = resolve_base(str(file))
    kind, _, zero_snr = row.becomes.partition(", ")
    assert found.prediction_type == kind
    assert bool(found.scheduler_config.get("rescale_betas_zero_snr")) == bool(zero_snr)
    read, wanted = tensors_of(found), tensors_of(resolve_base(str(base)))
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        kept = tensor.to(row.dtype).float()
        assert torch.equal(read[name], kept) or torch.equal(read[name], tensor), name


@pytest.mark.parametrize("row", [each for each in ROWS if each.why], ids=lambda each: each.name)
def test_it_is_refused_with_its_reason_at_the_prompt_and_in_a_job(
    row: File, bases: dict[str, Path], checkpoints: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    file = write(row, checkpoints[row.family], tmp_path)
    if row.ending == ".safetensors":
        put_configs_beside(bases[row.family], file, scheduler=False)
    with pytest.raises(ImportCheckpointError, match=row.why) as caught:
        check_checkpoint_import(ImportCheckpointConfig(source=str(file), output=str(tmp_path / "out")))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BaseModelError, match=row.why):
        resolve_base(str(file))


def test_the_table_of_the_page_is_this_one():
    assert table() in DOCS.read_text(), "Print it by `python -m tests.model.single_file.file_zoo`."
