"""A damaged checkpoint is never used: the run goes on from the one before it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from d2f_core.train.checkpoint import (
    KINDS,
    Checkpoint,
    CheckpointError,
    candidates,
    iter_tensors,
    list_checkpoints,
    manifest_bytes,
    read_checkpoint,
    read_tensors,
    seal,
)
from d2f_core.train.retention import apply_retention, read_evaluation, write_evaluation
from d2f_core.train.retention_rules import Retention
from tests.train.test_checkpoint import equal, shares, write

MUTATIONS = 200
GOOD, VICTIM = "step-00000005.a", "step-00000010.a"
Tensors = dict[str, dict[str, torch.Tensor]]


def original(step: int) -> Tensors:
    return {kind: {name: t for share in shares(step) for name, t in share[kind].items()} for kind in KINDS}


def read_all(found: Checkpoint) -> Tensors:
    return {kind: read_tensors(found, kind) for kind in KINDS}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(equal(one[kind], other[kind]) for kind in one)


def resume(output: Path) -> tuple[int, Tensors]:
    """What a launcher does: the newest checkpoint that can be read."""
    for found in candidates(str(output), "run"):
        try:
            return found.manifest.step, read_all(found)
        except CheckpointError:
            continue
    raise AssertionError("no checkpoint is left")


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("master")
    for step in (5, 10):
        write(output, step)
    return output


def read_files(directory: Path) -> list[Path]:
    """The files that resuming reads; the shares were only for the writers."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith("share-"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def pick(draw: np.random.Generator, files: list[Path]) -> Path:
    return files[draw.integers(len(files))]


def flip_bit(draw: np.random.Generator, victim: Path) -> None:
    file = pick(draw, read_files(victim))
    data = bytearray(file.read_bytes())
    data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    file.write_bytes(data)


def truncate(draw: np.random.Generator, victim: Path) -> None:
    file = pick(draw, read_files(victim))
    data = file.read_bytes()
    file.write_bytes(data[: draw.integers(len(data))])


def empty(draw: np.random.Generator, victim: Path) -> None:
    pick(draw, read_files(victim)).write_bytes(b"")


def append(draw: np.random.Generator, victim: Path) -> None:
    file = pick(draw, read_files(victim))
    data = file.read_bytes()
    file.write_bytes(data + [b" ", b"\n", b"\0", b"{}", data][draw.integers(5)])


def remove(draw: np.random.Generator, victim: Path) -> None:
    pick(draw, read_files(victim)).unlink()


def exchange(draw: np.random.Generator, victim: Path) -> None:
    files = read_files(victim)
    one, other = (files[place] for place in draw.choice(len(files), 2, replace=False))
    data = one.read_bytes(), other.read_bytes()
    other.write_bytes(data[0])
    one.write_bytes(data[1])


def take_from_another_step(draw: np.random.Generator, victim: Path) -> None:
    file = pick(draw, read_files(victim))
    shutil.copyfile(victim.with_name(GOOD) / file.name, file)


def rename_tensor(draw: np.random.Generator, victim: Path) -> None:
    file = pick(draw, [path for path in read_files(victim) if path.suffix == ".safetensors"])
    tensors = load(file.read_bytes())
    name = sorted(tensors)[draw.integers(len(tensors))]
    tensors[name.replace("layer", "lager")] = tensors.pop(name)
    file.write_bytes(save(tensors))


def edit_manifest(draw: np.random.Generator, victim: Path) -> None:
    file = victim / "manifest.json"
    fields = json.loads(file.read_text())
    name = sorted(fields)[draw.integers(len(fields))]
    if draw.integers(4) == 0:
        del fields[name]
    elif name == "files":
        entry = fields["files"][draw.integers(len(fields["files"]))]
        entry[["kind", "path", "sha256"][draw.integers(3)]] = "edited"
    elif name == "tensors":
        fields["tensors"]["weights"]["layer.0.weight"] = "0" * 64
    else:
        fields[name] = fields[name] + 1 if isinstance(fields[name], int) else {"edited": True}
    file.write_text(json.dumps(fields, indent=1, sort_keys=True))


Mutation = Callable[[np.random.Generator, Path], None]
KINDS_OF_DAMAGE: list[Mutation] = [
    flip_bit,
    truncate,
    empty,
    append,
    remove,
    exchange,
    take_from_another_step,
    rename_tensor,
    edit_manifest,
]


def test_every_damage_is_found_and_the_run_goes_on_from_the_checkpoint_before(master, tmp_path):
    draw = np.random.default_rng(2506)
    good = original(5)
    for number in range(MUTATIONS):
        output = tmp_path / str(number)
        shutil.copytree(master, output)
        # A quarter of them bit flips, the hardest to see.
        damage = flip_bit if number % 4 == 0 else KINDS_OF_DAMAGE[number % len(KINDS_OF_DAMAGE)]
        before = contents(output / "checkpoints" / VICTIM)
        damage(draw, output / "checkpoints" / VICTIM)
        assert contents(output / "checkpoints" / VICTIM) != before
        for found in list_checkpoints(str(output)):
            if found.uri.endswith(VICTIM):
                with pytest.raises(CheckpointError):
                    read_all(found)
        step, tensors = resume(output)
        assert step == 5, (number, damage.__name__)
        assert same(tensors, good), (number, damage.__name__)
        shutil.rmtree(output)


def test_the_undamaged_copy_is_resumed_from(master):
    step, tensors = resume(master)
    assert step == 10
    assert same(tensors, original(10))


def test_every_bit_of_the_manifest_counts(master, tmp_path):
    victim = tmp_path / VICTIM
    victim.mkdir()
    data = (master / "checkpoints" / VICTIM / "manifest.json").read_bytes()
    draw = np.random.default_rng(1)
    for place in draw.choice(len(data) * 8, 500, replace=False):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << int(place % 8)
        (victim / "manifest.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_checkpoint(str(victim))


def test_a_damaged_manifest_is_left_out_with_its_name_and_reason(master, tmp_path, caplog):
    shutil.copytree(master, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / VICTIM / "manifest.json").write_bytes(b'{"step": ')
    assert [found.manifest.step for found in list_checkpoints(str(tmp_path / "run"))] == [5]
    assert f"left out {tmp_path}/run/checkpoints/{VICTIM}" in caplog.text
    assert "JSONDecodeError" in caplog.text


def test_a_missing_file_is_named(master, tmp_path):
    shutil.copytree(master, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / VICTIM / "ema-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ema-1\.safetensors is missing: the checkpoint was damaged"):
        read_tensors(list_checkpoints(str(tmp_path / "run"))[-1], "ema")


def test_of_a_damaged_file_not_one_tensor_is_handed_on(master, tmp_path):
    shutil.copytree(master, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / VICTIM / "weights-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    handed_on = iter_tensors(list_checkpoints(str(tmp_path / "run"))[-1], "weights")
    whole = shares(10)[0]["weights"]
    assert equal(dict(next(handed_on) for _ in whole), whole)
    with pytest.raises(CheckpointError, match=r"weights-1\.safetensors has sha256"):
        next(handed_on)


def rewritten(found: Checkpoint, **changes: object) -> Checkpoint:
    """The checkpoint after its manifest was replaced by one with a right digest."""
    fields = json.loads(manifest_bytes(found.manifest)) | changes
    del fields["digest"]
    (Path(found.uri) / "manifest.json").write_bytes(seal(fields))
    return read_checkpoint(found.uri)


def test_bytes_that_hash_right_but_hold_other_tensors_are_refused(master, tmp_path):
    """A forged or wrongly written file: the parser sees anything, the tensors' digests still decide."""
    shutil.copytree(master, tmp_path / "run")
    found = list_checkpoints(str(tmp_path / "run"))[-1]
    file = Path(found.uri) / "weights-0.safetensors"
    data, draw, good = file.read_bytes(), np.random.default_rng(7), original(10)["weights"]
    refused = 0
    for number in range(300):
        changed = bytearray(data)
        changed[draw.integers(len(data) if number % 2 else 16)] = int(draw.integers(256))
        changed = changed[: draw.integers(len(changed))] if number % 10 == 0 else changed
        file.write_bytes(changed)
        digest = hashlib.sha256(changed).hexdigest()
        own = [asdict(entry) for entry in found.manifest.files]
        own = [e | {"size": len(changed), "sha256": digest} if e["path"] == file.name else e for e in own]
        try:
            assert equal(read_tensors(rewritten(found, files=own), "weights"), good)
        except CheckpointError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"kind": "weights", "path": "../../secret", "size": 1, "sha256": ""}]},
        {"files": [{"kind": "weights", "path": "/etc/passwd", "size": 1, "sha256": ""}]},
        {"files": [{"kind": "weights"}]},
        {"files": None},
        {"step": "10"},
        {"step": 11},
        {"tensors": {"weights": ["layer"]}},
        {"unknown": 1},
    ],
)
def test_a_manifest_that_hashes_right_but_makes_no_sense_is_refused(master, tmp_path, changes):
    shutil.copytree(master, tmp_path / "run")
    with pytest.raises(CheckpointError, match="checkpoint"):
        rewritten(list_checkpoints(str(tmp_path / "run"))[-1], **changes)


def test_tensors_that_the_manifest_does_not_list_are_refused(master, tmp_path):
    shutil.copytree(master, tmp_path / "run")
    found = list_checkpoints(str(tmp_path / "run"))[-1]
    listed = {kind: dict(named) for kind, named in found.manifest.tensors.items()}
    listed["weights"].pop("layer.0.scale")
    with pytest.raises(CheckpointError, match=r"holds against its manifest weights of 'layer\.0\.scale'"):
        read_tensors(rewritten(found, tensors=listed), "weights")
    listed["weights"] |= {"layer.0.scale": found.manifest.tensors["weights"]["layer.0.scale"], "layer.9": "0"}
    with pytest.raises(CheckpointError, match=r"lacks weights of 'layer\.9'"):
        read_tensors(rewritten(found, tensors=listed), "weights")


def test_a_damaged_evaluation_is_an_error_and_never_the_best(master, tmp_path):
    shutil.copytree(master, tmp_path / "run")
    old, new = list_checkpoints(str(tmp_path / "run"))
    for found, loss in ((old, 0.1), (new, 0.2)):
        write_evaluation(found.uri, {"loss": loss})
    file = Path(old.uri) / "evaluation.json"
    file.write_bytes(file.read_bytes().replace(b"0.1", b"0.0"))
    with pytest.raises(CheckpointError, match=r"evaluation\.json .* was damaged"):
        read_evaluation(old.uri)
    assert apply_retention(str(tmp_path / "run"), Retention(keep_last=1, keep_best=1, metric="loss")) == [old.uri]
