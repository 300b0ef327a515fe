"""The step loop needs no cluster: a linear layer with AdamW is its engine."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from d2f_core.train.steps import NonFiniteLossError, consumed_digest, train_steps


class PlainEngine:
    """Accumulates like DeepSpeed: steps at every `accumulation`-th call."""

    def __init__(self, accumulation: int) -> None:
        torch.manual_seed(0)
        self.module, self.accumulation, self.calls = nn.Linear(1, 1), accumulation, 0
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)

    def __call__(self, x):
        return self.module(x)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def step(self):
        self.calls += 1
        if self.calls % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def tables(values, size):
    for start in range(0, len(values), size):
        part = values[start : start + size]
        yield pa.table({"x": part, "epoch": [0] * len(part), "row": list(range(start, start + len(part)))})


def to_batch(table):
    return {"x": torch.tensor(table.column("x").to_pylist())[:, None]}


def loss_fn(network, batch):
    return (network(batch["x"]) - 1).square()[:, 0]


def test_accumulated_micro_batches_equal_one_batch():
    values = torch.linspace(-1, 1, 16).tolist()
    weights, losses = [], []
    for accumulation in (1, 4):
        engine = PlainEngine(accumulation)
        results = list(
            train_steps(engine, tables(values, 8 // accumulation), to_batch, loss_fn, accumulation=accumulation)
        )
        assert [result.step for result in results] == [1, 2]
        weights.append(engine.module.weight.item())
        losses.append([float(result.loss) for result in results])
    assert weights[0] == pytest.approx(weights[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_the_weights_alone():
    engine = PlainEngine(1)
    before = engine.module.weight.item()
    with pytest.raises(NonFiniteLossError, match=r"step 7: the loss of 1 samples is not finite \(table rows \[2\]"):
        list(
            train_steps(
                engine, tables([0.1, 0.2, float("nan"), 0.3], 4), to_batch, loss_fn, accumulation=1, first_step=7
            )
        )
    assert engine.module.weight.item() == before


def test_before_step_runs_once_per_optimizer_step():
    seen = []
    steps = train_steps(
        PlainEngine(2), tables([0.0] * 8, 2), to_batch, loss_fn, accumulation=2, first_step=3, before_step=seen.append
    )
    list(steps)
    assert seen == [3, 4]


def test_a_row_that_cannot_be_used_adds_nothing_and_does_not_change_the_divisor():
    def weight_after(values, reasons):
        engine = PlainEngine(1)
        table = pa.table({"x": values, "epoch": [0] * 4, "row": [5, 6, 7, 8], "reason": pa.array(reasons, pa.string())})
        (result,) = train_steps(engine, [table], to_batch, loss_fn, accumulation=1)
        return engine.module.weight.item(), result

    gradient_of_three, result = weight_after([0.1, 0.2, 0.9, 0.3], [None, None, "not_finite: x", None])
    assert result.unusable == ((7, "not_finite: x"),)
    engine = PlainEngine(1)
    losses = loss_fn(engine, {"x": torch.tensor([[0.1], [0.2], [0.3]])})
    engine.backward(losses.sum() / 4)
    engine.step()
    assert gradient_of_three == pytest.approx(engine.module.weight.item(), abs=1e-7)
    assert gradient_of_three != pytest.approx(weight_after([0.1, 0.2, 0.9, 0.3], [None] * 4)[0], abs=1e-4)


def test_the_digest_of_what_was_used_adds_up_in_any_order_and_tells_samples_apart():
    epochs, rows = np.repeat([0, 1], 50), np.tile(np.arange(50), 2)
    whole = consumed_digest(epochs, rows)
    shuffled = np.random.default_rng(0).permutation(100)
    parts = [consumed_digest(epochs[part], rows[part]) for part in (shuffled[:30], shuffled[30:])]
    assert sum(parts) % 2**64 == whole
    rows[3] = 4  # one sample missing, another one twice
    assert consumed_digest(epochs, rows) != whole


def test_what_is_said_once_a_step_is_heard_with_that_step():
    said = iter([0, 2, 1])
    steps = train_steps(
        PlainEngine(2), tables([1.0] * 24, 4), to_batch, loss_fn, accumulation=2, signal=lambda: next(said)
    )
    assert [result.signals for result in steps] == [0, 2, 1]
