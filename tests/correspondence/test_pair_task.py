"""Given pairs with stored targets have the loss that they have within a micro-batch of images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence import distillation as d
from d2f_core.correspondence.config import DistillationConfig, MatcherConfig, StudentConfig, TargetConfig
from d2f_core.correspondence.matching import similarity
from d2f_core.correspondence.pair_task import PairTask
from d2f_core.correspondence.student import tokens, trained
from d2f_core.correspondence.targets.actor import fused_of, match_targets
from d2f_core.correspondence.targets.spec import PIXELS, WAYS, target_fields
from d2f_core.correspondence.task import PIXELS as IMAGE
from d2f_core.correspondence.task import MatcherTask
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.schema import array_field
from tests.correspondence.test_task import CONFIG, GRID, IMAGES, SIDE, TEACHERS, table
from tests.correspondence.tiny_transformers import write

TOKENS = GRID[0] * GRID[1]
ALL = TargetConfig(shares=CONFIG.shares, kept=TOKENS, probabilities="float32")


def pair_table(images: pa.Table, of: TargetConfig = ALL) -> pa.Table:
    """All pairs of the images, as `embed_pairs` writes them."""
    arrays = table_to_arrays(images)
    rows = [{name: values[row] for name, values in arrays.items()} for row in range(IMAGES)]
    known = [fused_of(row, TEACHERS, GRID, of, "cpu") for row in rows]
    made = []
    for one, other in zip(*(each.tolist() for each in d.all_pairs(IMAGES)), strict=True):
        pixels = dict(zip(PIXELS, (rows[one][IMAGE], rows[other][IMAGE]), strict=True))
        made.append(pixels | match_targets(known[one], known[other], GRID, of))
    targets = [field for way in WAYS for field in target_fields(way, TOKENS, of.kept, of.probabilities, cycle=of.cycle)]
    schema = pa.schema([*(array_field(name, "uint8", (SIDE, SIDE, 3)) for name in PIXELS), *targets])
    whole = arrays_to_table({name: np.stack([row[name] for row in made]) for name in schema.names}, schema)
    count = len(made)
    return whole.append_column("epoch", pa.array([0] * count)).append_column("row", pa.array(range(count)))


def tasks(tmp_path: Path, config: DistillationConfig = CONFIG, dropout: float = 0.0) -> tuple[MatcherTask, PairTask]:
    student = StudentConfig(base=str(write(tmp_path / "base", "dinov2")), dropout=dropout)
    whole = MatcherConfig(student=student, distillation=config)
    made = (
        MatcherTask(whole, TEACHERS, normalisation="imagenet", seed=0),
        PairTask(whole, normalisation="imagenet", seed=0),
    )
    for task in made:  # adapters as in the midst of a training
        for name, value in task.module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, 0.0, 0.1, generator=torch.Generator().manual_seed(1))
    return made


def gradients(task: MatcherTask | PairTask, rows: pa.Table) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = task.loss(task.module, task.to_batch(rows))
    loss.mean().backward()
    return loss.detach(), {name: value.grad for name, value in trained(task.module) if value.grad is not None}


@pytest.mark.parametrize(
    "change",
    [
        {}, {"finer": 1, "cycle": False}, {"loss": "kl"}, {"loss": "soft_argmax", "weight": 3.0},
        {"loss": "gaussian_cross_entropy"}, {"loss": "reference_double_softmax", "cycle": False},
    ],
)  # fmt: skip
def test_all_pairs_of_some_images_have_the_loss_and_gradients_of_their_micro_batch(tmp_path: Path, change) -> None:
    config = replace(CONFIG, **change)
    images, pairs = tasks(tmp_path, config)
    stored = pair_table(table(), replace(ALL, finer=config.finer, cycle=config.cycle))
    (wanted, slopes), (found, others) = gradients(images, table()), gradients(pairs, stored)
    assert found.shape == (IMAGES * (IMAGES - 1) // 2,) and found.dtype == torch.float32
    assert_close(found.mean(), wanted.mean(), rtol=1e-6, atol=1e-6)
    assert slopes.keys() == others.keys() and any(value.abs().max() > 1e-4 for value in slopes.values())
    for name, value in slopes.items():
        assert_close(others[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [2, 4])
def test_what_is_dropped_bounds_what_it_changes(tmp_path: Path, kept: int) -> None:
    """To spread the dropped share over those kept moves it by at most the range of a token's log-probabilities."""
    config = replace(CONFIG, teacher_temperature=0.1)
    _, pairs = tasks(tmp_path, config)
    of = replace(ALL, teacher_temperature=0.1)
    whole, short = (pair_table(table(), replace(of, kept=count)) for count in (TOKENS, kept))
    wanted, found = (pairs.loss(pairs.module, pairs.to_batch(rows)).detach() for rows in (whole, short))
    dropped = table_to_arrays(short, [f"{way}_dropped" for way in WAYS])
    weights = table_to_arrays(short, [f"{way}_weights" for way in WAYS])
    source, target = tokens(pairs.module, pairs.to_batch(whole)["pixels"], 14)[0].chunk(2)
    bound = torch.zeros(len(found))
    for row in range(len(found)):
        for way, one, other in zip(WAYS, (source, target), (target, source), strict=True):
            logs = torch.log_softmax(similarity(one[row], other[row]) / config.temperature, dim=-1).detach()
            share, weight = (torch.tensor(each[row]) for each in (dropped[f"{way}_dropped"], weights[f"{way}_weights"]))
            each = share * (logs.amax(1) - logs.amin(1))
            bound[row] += (weight * each).sum() / weight.sum() / 2
    assert (found != wanted).all() and ((found - wanted).abs() <= bound + 1e-6).all()
    assert np.mean(dropped["forward_dropped"]) > 0.05, "or nothing would be shown"


def test_half_precision_changes_the_loss_in_the_fourth_digit(tmp_path: Path) -> None:
    _, pairs = tasks(tmp_path)
    exact, half = (pair_table(table(), replace(ALL, probabilities=kind)) for kind in ("float32", "float16"))
    wanted, found = (pairs.loss(pairs.module, pairs.to_batch(rows)).detach() for rows in (exact, half))
    assert_close(found, wanted, rtol=1e-3, atol=0.0)
    assert half.nbytes < exact.nbytes


def test_a_row_that_stands_in_for_another_has_no_loss(tmp_path: Path) -> None:
    _, pairs = tasks(tmp_path)
    stored = pair_table(table()).slice(0, 3)
    reasons = pa.array([None, "damaged", None], pa.string())
    found = pairs.loss(pairs.module, pairs.to_batch(stored.append_column("reason", reasons)))
    wanted = pairs.loss(pairs.module, pairs.to_batch(stored))
    assert found[1] == 0 and torch.equal(found[[0, 2]], wanted[[0, 2]])
    none = pairs.loss(pairs.module, pairs.to_batch(stored.append_column("reason", pa.array(["x"] * 3))))
    none.mean().backward()
    assert not none.any() and all(not value.grad.any() for _, value in trained(pairs.module))


def test_dropout_is_the_micro_batchs_own(tmp_path: Path) -> None:
    images, pairs = tasks(tmp_path, dropout=0.5)
    pairs.module.train()
    stored = pair_table(table())
    batch, other = pairs.to_batch(stored), pairs.to_batch(stored.take([1, 0, 2]))
    first = pairs.loss(pairs.module, batch)
    torch.manual_seed(7)
    assert torch.equal(pairs.loss(pairs.module, batch), first)
    assert batch["dropout"] == images.to_batch(table())["dropout"] != other["dropout"], (
        "by the first row's key, in both"
    )
    pairs.module.eval()
    assert not torch.equal(pairs.loss(pairs.module, batch), first)
