"""Kept models: each is noted with its source, and those that were read longest ago go when room is short."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2f_core import cache
from d2f_core.cache import CacheError, kept, kept_models, make_room, prune
from d2f_core.hashing import one_at_a_time

HOUR = 3600.0


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path))
    root = tmp_path / "models"
    for number, (name, hours) in enumerate((("new", 0.1), ("old", 30), ("older", 60), ("middle", 2))):
        with one_at_a_time(root / name):
            (root / name / "unet").mkdir(parents=True)
            (root / name / "unet/weights").write_bytes(b"x" * 1000 * (number + 1))
            (root / name / "link").symlink_to(__file__)
            kept(root / name, f"s3://models/{name}")
        os.utime(root / name, (time.time(), time.time() - hours * HOUR))
    (root / ".other.partial").mkdir()
    (root / "half.partial").mkdir()
    return root


def names(root: Path) -> set[str]:
    return {each.path.name for each in kept_models(root)}


def test_models_are_listed_by_their_last_use_with_source_and_size(models: Path):
    found = kept_models()
    assert [(each.path.name, each.source, each.size) for each in found] == [
        ("older", "s3://models/older", 3000),
        ("old", "s3://models/old", 2000),
        ("middle", "s3://models/middle", 4000),
        ("new", "s3://models/new", 1000),
    ]


def test_what_was_read_longest_ago_goes_until_the_rest_fits(models: Path):
    assert [each.path.name for each in prune(None, 6e-6)] == ["older", "old"]
    assert names(models) == {"middle", "new"} and not Path(f"{models}/older.source").exists()
    assert prune(None, 6e-6) == []
    assert [each.path.name for each in prune(None, 0)] == ["middle"], "the newest may be about to be loaded"
    assert [each.path.name for each in prune(None, 0, idle_hours=0)] == ["new"]
    assert sorted(path.name for path in models.iterdir() if path.is_dir()) == [".other.partial", "half.partial"]


def test_a_model_that_is_given_out_while_others_look_stays(models: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = cache.to_remove

    def given_out_meanwhile(*arguments, **more):
        found = chosen(*arguments, **more)
        kept(models / "older", "s3://models/older")
        return found

    monkeypatch.setattr(cache, "to_remove", given_out_meanwhile)
    assert [each.path.name for each in prune(None, 6e-6)] == ["old"] and "older" in names(models)


def test_the_limit_of_the_environment_is_kept(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("D2F_CACHE_GB", raising=False)
    make_room(models)
    assert len(names(models)) == 4
    monkeypatch.setenv("D2F_CACHE_GB", "0.000005")
    make_room(models)
    assert names(models) == {"middle", "new"}
    for wrong in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("D2F_CACHE_GB", wrong)
        with pytest.raises(CacheError, match=f"D2F_CACHE_GB='{wrong}' must be a positive number"):
            make_room(models)


def test_the_commands_show_and_remove_models(models: Path):
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pipelines.cache", *arguments]
        return subprocess.check_output(command, text=True, timeout=60)

    told = run("list")
    assert "days ago  s3://models/older" in told and "in 4 models" in told
    told = run("prune", "--max-gb", "0.000006", "--dry-run")
    assert "older" in told and "in 2 models" in told and len(names(models)) == 4
    run("prune", "--max-gb", "0.000006")
    assert names(models) == {"middle", "new"}
