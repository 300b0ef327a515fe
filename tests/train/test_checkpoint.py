"""A checkpoint exists whole or not at all, is read back bit for bit, and stays as long as a rule keeps it."""

import json
from pathlib import Path

import pytest
import torch

from d2f_core import storage
from d2f_core.train import checkpoint, retention
from d2f_core.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFile,
    CheckpointManifest,
    OtherFormatError,
    candidates,
    list_checkpoints,
    read_checkpoint,
    read_tensors,
    tensor_digest,
)
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.retention import apply_retention, read_evaluation, write_evaluation
from d2f_core.train.retention_rules import Retention
from d2f_core.train.selection import select
from d2f_core.train.weights import ParameterMismatchError, check_loaded, load_parameters

KEEP_ALL = Retention(keep_last=10**6)


def shares(step: int, num_workers: int = 2) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Tensors of several types and shapes, different in every worker, kind and step."""
    draw = torch.Generator().manual_seed(step)
    return [
        {
            kind: {
                f"layer.{rank}.weight": torch.randn(3, 2, generator=draw),
                f"layer.{rank}.scale": torch.randn((), generator=draw).bfloat16(),
            }
            for kind in checkpoint.KINDS
        }
        for rank in range(num_workers)
    ]


def write(output: str | Path, step: int, *, attempt: str = "a", identity: str = "run") -> str:
    """A complete checkpoint of two workers."""
    writers = [CheckpointWriter(str(output), attempt, rank, 2, KEEP_ALL, share_seconds=20) for rank in range(2)]
    for writer, tensors in zip(writers, shares(step), strict=True):
        writer.save(step, samples=step * 4, identity=identity, tensors=tensors, state={"bad": [f"row {step}"]})
    for writer in writers[::-1]:
        writer.wait()
    assert writers[0].last_complete
    return writers[0].last_complete[1]


def unfinished(output: Path, step: int, attempt: str) -> Path:
    directory = Path(checkpoint.checkpoints_uri(str(output))) / checkpoint.directory_name(step, attempt)
    directory.mkdir(parents=True)
    (directory / "weights-0.safetensors").write_bytes(b"half")
    return directory


def names(output: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-0000000") for path in (output / "checkpoints").iterdir())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return {n: tensor_digest(t) for n, t in one.items()} == {n: tensor_digest(t) for n, t in other.items()}


def test_tensors_of_all_shares_come_back_bit_for_bit(tmp_path):
    found = read_checkpoint(write(tmp_path, 3))
    for kind in checkpoint.KINDS:
        assert equal(read_tensors(found, kind), shares(3)[0][kind] | shares(3)[1][kind])
    assert found.manifest.state == {"bad": ["row 3"]}
    assert (found.manifest.step, found.manifest.samples, found.manifest.num_workers) == (3, 12, 2)


def test_checkpoints_on_s3_are_written_found_read_and_retained(s3):
    output = "s3://d2f/test-checkpoint/run"
    for step in (1, 2, 3):
        write(output, step)
    write_evaluation(list_checkpoints(output)[0].uri, {"loss": 0.5})
    removed = apply_retention(output, Retention(keep_last=1, keep_best=1, metric="loss", keep_every=1000))
    assert removed == []  # 2 and 3 wait for their evaluation
    for found in list_checkpoints(output)[1:]:
        write_evaluation(found.uri, {"loss": 0.75})
    assert len(apply_retention(output, Retention(keep_last=1, keep_best=1, metric="loss"))) == 1
    assert [found.manifest.step for found in candidates(output, "run")] == [3, 1]
    assert equal(read_tensors(candidates(output, "run")[0], "ema"), shares(3)[0]["ema"] | shares(3)[1]["ema"])
    with pytest.raises(CheckpointError, match="started before"):
        write(output, 3)


def test_a_kind_that_was_not_saved_is_empty(tmp_path):
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL)
    writer.save(1, samples=4, identity="run", tensors={"weights": {"w": torch.ones(2)}, "ema": {}}, state={})
    writer.wait()
    assert read_tensors(list_checkpoints(str(tmp_path))[0], "ema") == {}


def test_a_directory_without_manifest_does_not_exist(tmp_path, caplog):
    write(tmp_path, 5)
    unfinished(tmp_path, 10, "a")
    (tmp_path / "checkpoints" / "notes.txt").write_text("not a checkpoint")
    assert [found.manifest.step for found in candidates(str(tmp_path), "run")] == [5]
    assert not caplog.records
    assert candidates(str(tmp_path / "new"), "run") == []


def test_the_order_is_by_step_and_then_by_attempt(tmp_path):
    for step, attempt in ((10, "a"), (5, "b"), (5, "a")):
        write(tmp_path, step, attempt=attempt)
    found = list_checkpoints(str(tmp_path))
    assert [Path(c.uri).name[-4:] for c in found] == ["05.a", "05.b", "10.a"]
    assert candidates(str(tmp_path), "run") == found[::-1]


def test_a_run_with_another_identity_is_refused(tmp_path):
    write(tmp_path, 5, identity="another")
    with pytest.raises(CheckpointError, match="Choose another --output"):
        candidates(str(tmp_path), "run")
    write(tmp_path, 6)
    assert [found.manifest.step for found in candidates(str(tmp_path), "run")] == [6]


def test_a_checkpoint_of_an_earlier_release_is_refused_not_left_out(tmp_path):
    directory = unfinished(tmp_path, 5, "a")
    (directory / "manifest.json").write_text(json.dumps({"step": 5, "format_version": 1, "files": []}))
    with pytest.raises(OtherFormatError, match=r"format_version=1; this release reads 2.*another output"):
        candidates(str(tmp_path), "run")


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b"])
def test_a_file_outside_the_directory_is_refused(path):
    with pytest.raises(CheckpointError, match="not a plain name inside its directory"):
        CheckpointFile(kind="weights", path=path, size=1, sha256="")


def test_a_digest_is_of_type_shape_and_bits():
    zero = torch.zeros(4)
    others = [zero.reshape(2, 2), zero.int(), zero.bfloat16(), -zero, torch.zeros(5), torch.zeros(0)]
    assert len({tensor_digest(tensor) for tensor in [zero, *others]}) == 7
    grid = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(grid.T) == tensor_digest(grid.T.contiguous()) != tensor_digest(grid)


def test_loaded_parameters_are_compared_with_what_was_saved(tmp_path):
    found = read_checkpoint(write(tmp_path, 3))
    share = shares(3)[1]["weights"]
    check_loaded(found, "weights", share)
    for changed in (share["layer.1.weight"] + 1e-7, share["layer.1.weight"].T, share["layer.1.weight"].double()):
        with pytest.raises(CheckpointError, match=r"weights of 'layer\.1\.weight' .* do not train on"):
            check_loaded(found, "weights", share | {"layer.1.weight": changed})
    with pytest.raises(CheckpointError, match=r"exp_avg of 'layer\.1\.weight'"):
        check_loaded(found, "exp_avg", share)
    with pytest.raises(CheckpointError, match="does not have this parameter"):
        check_loaded(found, "weights", {"new": torch.zeros(1)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": 0}, "keep_last=0 must be at least 1"),
        ({"keep_best": -1}, "keep_best=-1 must be at least 0"),
        ({"keep_every": -1}, "keep_every=-1 must be at least 0"),
        ({"keep_best": 1}, "keep_best=1 needs a metric"),
    ],
)
def test_an_impossible_retention_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Retention(**fields)


def test_old_checkpoints_and_left_overs_before_them_go(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    for step, attempt in ((2, "killed"), (3, "killed"), (5, "under-way")):
        unfinished(tmp_path, step, attempt)
    (Path(write(tmp_path, 2, attempt="broken")) / "manifest.json").write_bytes(b"{")
    assert len(apply_retention(str(tmp_path), Retention(keep_last=2))) == 4
    assert names(tmp_path) == ["3.a", "3.killed", "4.a", "5.under-way"]


def test_without_a_complete_checkpoint_nothing_goes(tmp_path):
    unfinished(tmp_path, 1, "a")
    assert apply_retention(str(tmp_path), Retention()) == []
    assert names(tmp_path) == ["1.a"]


def values(losses: dict[int, float | None], rule: Retention) -> list[int]:
    """Steps that `rule` keeps, of checkpoints with these losses."""
    complete = []
    for step in losses:
        manifest = CheckpointManifest(step=step, samples=0, identity="", num_workers=1, files=(), state={}, tensors={})
        complete.append(Checkpoint(str(step), manifest))
    return sorted(int(uri) for uri in retention.kept(complete, rule, {str(step): v for step, v in losses.items()}))


def test_the_best_stay_and_those_that_are_not_evaluated_yet():
    nan = float("nan")
    best = Retention(keep_last=1, keep_best=2, metric="loss")
    assert values({1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4}, best) == [2, 3, 4]
    assert values({1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4}, Retention(keep_best=1, metric="r", lower_is_better=False)) == [3, 4]
    assert values({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.9}, best) == [2, 3, 4], "of equal ones the newer stay"
    assert values({1: nan, 2: 0.5, 3: None, 4: 0.7, 5: None, 6: None}, best) == [2, 4, 5, 6]
    assert values({1: None, 2: None, 3: None}, best) == [1, 2, 3]


def test_every_so_many_steps_one_stays_for_ever():
    assert values(dict.fromkeys(range(1, 11)), Retention(keep_last=1, keep_every=4)) == [4, 8, 10]


def test_one_that_is_being_evaluated_stays(tmp_path):
    uris = [write(tmp_path, step) for step in (1, 2, 3)]
    assert apply_retention(str(tmp_path), Retention(keep_last=1), [uris[0] + "/"]) == [uris[1]]


def test_the_newest_that_was_evaluated_stays_for_the_case_that_the_model_collapses(tmp_path):
    for step in (1, 2, 3, 4, 5):
        uri = write(tmp_path, step)
        if step in (1, 2):
            write_evaluation(uri, {"loss": 1.0})
    apply_retention(str(tmp_path), Retention(keep_last=2))
    assert [one.manifest.step for one in list_checkpoints(str(tmp_path))] == [2, 4, 5]


def test_later_checkpoints_can_be_left_out_of_the_rules(tmp_path):
    for step in (1, 2, 9):
        write(tmp_path, step)
    apply_retention(str(tmp_path), Retention(keep_last=1), up_to_step=2)
    assert names(tmp_path) == ["2.a", "9.a"]


def test_a_checkpoint_deleted_by_half_does_not_exist(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    remove = storage.remove_tree

    def killed_after_the_first_file(uri: str) -> None:
        remove(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "remove_tree", killed_after_the_first_file)
    with pytest.raises(KeyboardInterrupt):
        apply_retention(str(tmp_path), Retention(keep_last=1))
    assert (tmp_path / "checkpoints" / "step-00000001.a" / "weights-0.safetensors").exists()
    assert [found.manifest.step for found in list_checkpoints(str(tmp_path))] == [2]
    monkeypatch.undo()
    apply_retention(str(tmp_path), Retention(keep_last=1))
    assert names(tmp_path) == ["2.a"]


def test_an_evaluation_is_written_once(tmp_path):
    uri = write(tmp_path, 1)
    assert read_evaluation(uri) is None
    for _ in range(2):
        write_evaluation(uri, {"loss": 0.5, "rate": float("inf")})
    assert read_evaluation(uri) == {"loss": 0.5, "rate": float("inf")}
    with pytest.raises(CheckpointError, match="holds other metrics already"):
        write_evaluation(uri, {"loss": 0.25})
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        write_evaluation(str(unfinished(tmp_path, 2, "a")), {"loss": 0.5})


def module(shape: tuple[int, ...] = (3, 2), *, extra: bool = False) -> torch.nn.Module:
    """What `shares` were saved of, but for the shape of its last weight, and for one layer more."""
    network = torch.nn.Module()
    network.layer = torch.nn.ModuleList(torch.nn.Module() for _ in range(3 if extra else 2))
    for number, layer in enumerate(network.layer):
        layer.weight = torch.nn.Parameter(torch.zeros(shape if number == 1 else (3, 2)))
        layer.scale = torch.nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    return network


def test_weights_come_into_a_network_of_their_names_and_shapes_alone(tmp_path):
    found, network = read_checkpoint(write(tmp_path, 1)), module()
    load_parameters(network, found, "ema")
    assert equal(dict(network.named_parameters()), shares(1)[0]["ema"] | shares(1)[1]["ema"])
    # As many numbers, which a copy without the check would refuse or, of one row, spread over all.
    for shape in ((2, 3), (6,), (4, 3, 2)):
        with pytest.raises(
            ParameterMismatchError, match=r"'layer.1.weight' has shape \(3, 2\), not .*Use the model config"
        ):
            load_parameters(module(shape), found)
    with pytest.raises(
        ParameterMismatchError, match=r"same parameters: \['layer.2.scale', 'layer.2.weight'\] .*, 2 in all"
    ):
        load_parameters(module(extra=True), found)
    with pytest.raises(ParameterMismatchError, match=r"not have the same parameters: \['layer.0.scale'.*, 4 in all"):
        load_parameters(torch.nn.Module(), found)


@pytest.mark.parametrize("which", ["newest", "best", 3])
def test_an_output_without_a_checkpoint_is_named(tmp_path, which):
    unfinished(tmp_path, 3, "a")
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\. Give the output of a training that has"):
        select(str(tmp_path), which, KEEP_ALL)
