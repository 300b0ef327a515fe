"""A training config refuses what cannot work, with the fix."""

import pytest

from d2f_core.model.ema import EmaConfig
from d2f_core.train.config import TrainConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"global_batch_size": 100, "micro_batch_size": 16, "num_workers": 2},
            r"multiple of .* = 32\. Nearest that fits: 96",
        ),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"precision": "bf16", "zero_stage": 0}, "Use zero_stage 1, 2 or 3"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
    ],
)
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_accumulation_fills_the_global_batch():
    assert TrainConfig(global_batch_size=96, micro_batch_size=8, num_workers=3).gradient_accumulation_steps == 4


def test_learning_rate_rises_then_falls_to_its_floor():
    config = TrainConfig(
        num_steps=110, warmup_steps=10, learning_rate=1.0, decay="cosine", final_learning_rate_factor=0.1
    )
    assert config.learning_rate_at(0) == pytest.approx(0.1)
    assert config.learning_rate_at(9) == config.learning_rate_at(10) == pytest.approx(1.0)
    assert config.learning_rate_at(60) == pytest.approx(0.55)
    assert config.learning_rate_at(110) == pytest.approx(0.1)


def test_ema_decay_warms_up_to_its_value():
    ema = EmaConfig(decay=0.99, start_step=5)
    assert ema.decay_at(5) == 0 and 0 < ema.decay_at(6) < ema.decay_at(7) < ema.decay_at(10**6) == 0.99
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        EmaConfig(decay=1.0)
