"""A workflow's stage runs once for one config and input, and its record is only trusted while its output is there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from d2f_core.identity import stage_key
from d2f_core.stages import StageOutcome, StageResult, run_stage


@dataclass(frozen=True, kw_only=True)
class Config:
    output: str = "somewhere"
    steps: tuple[int, ...] = (2, 4)


class Stage:
    """Writes a file; counts how often."""

    def __init__(self, directory: Path) -> None:
        self.file, self.record, self.runs = directory / "output", directory / "stage.json", 0

    def make(self) -> StageOutcome:
        self.runs += 1
        self.file.write_text("x")
        return StageOutcome(count=7, outputs={"uri": str(self.file)})

    def run(self, key: str, make: Any = None) -> StageResult:
        return run_stage(
            "paint", record_uri=str(self.record), key=key, unit="images", run=make or self.make,
            still_there=lambda outputs: Path(outputs["uri"]).exists(),
        )  # fmt: skip


def test_a_complete_stage_is_skipped_and_says_what_it_made(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    first, second = stage.run("k"), stage.run("k")
    assert stage.runs == 1 and (first.skipped, second.skipped) == (False, True)
    assert second.outputs == first.outputs and second.count == 7
    assert second.summary() == {**first.summary(), "skipped": True}


def test_another_key_and_a_lost_output_run_the_stage_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.run("k")
    assert not stage.run("other").skipped
    stage.file.unlink()
    assert not stage.run("other").skipped
    assert stage.runs == 3


def test_a_stage_that_fails_leaves_no_record(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    def fail() -> StageOutcome:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        stage.run("k", fail)
    assert not stage.record.exists()
    assert not stage.run("k").skipped


def test_the_key_depends_on_every_field_and_input() -> None:
    keys = {
        stage_key(Config(), {"images": "a"}),
        stage_key(Config(), {"images": "b"}),
        stage_key(Config(steps=(4, 2)), {"images": "a"}),
        stage_key(Config(output="elsewhere"), {"images": "a"}),
    }
    assert len(keys) == 4
    assert stage_key(Config(), {"x": "1", "y": "2"}) == stage_key(Config(), {"y": "2", "x": "1"})


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.record.write_text("{}")
    with pytest.raises(ValueError, match=r"stage\.json.*no \['count', 'key'.*Remove it"):
        stage.run("k")


def test_a_config_that_came_back_from_yaml_has_the_same_key() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cpus:
        per_worker: float

    assert (
        stage_key(Cpus(per_worker=1), {}) == stage_key(Cpus(per_worker=1.0), {}) != stage_key(Cpus(per_worker=1.5), {})
    )


@pytest.mark.parametrize("damaged", [b"", b'{"key": "k"', b"\xff\xfe{}", b"[]", b"3", b'{"key": "k", "count": 7}'])
def test_a_damaged_record_is_named_and_the_stage_does_not_run(tmp_path: Path, damaged: bytes) -> None:
    stage = Stage(tmp_path)
    stage.record.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"stage\.json' is not a stage record \(.*\)\. Remove it; the stage then runs again"
    ):
        stage.run("k")
    assert stage.runs == 0
