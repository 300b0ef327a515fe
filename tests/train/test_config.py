"""A training config refuses what cannot work, with the fix."""

import sys
from pathlib import Path

import pytest

from d2f_core.identity import identity_values
from d2f_core.train.compiler import missing_compiler
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.recipes import AUTOENCODER, FINETUNE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"global_batch_size": 100, "micro_batch_size": 16, "num_workers": 2},
            r"multiple of .* = 32\. Nearest that fits: 96",
        ),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
        ({"lanes": 0}, "lanes=0 must be at least 1"),
        ({"window_rows": 0}, "window_rows=0 must be at least 1"),
        ({"max_quarantined_share": 1.5}, r"max_quarantined_share=1.5 must lie in \[0, 1\]"),
        ({"max_quarantined_share": float("nan")}, r"max_quarantined_share=nan must lie in \[0, 1\]"),
        ({"max_failures": -2}, "max_failures=-2 must be at least -1"),
        ({"worker_timeout_seconds": 0}, "worker_timeout_seconds=0 must be at least 1"),
        ({"min_workers": 3, "num_workers": 2}, "min_workers=3 is above num_workers=2. Lower it"),
        ({"keep_best": -1}, "keep_best=-1 must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"clip_grad_norm": -1.0}, r"clip_grad_norm=-1.0 must be at least 0"),
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
    assert EmaConfig(decay=0.999, start_step=1000).decay_at(1015) == pytest.approx(1 - 16**-0.75)  # by power 0.75
    assert ema.decay_at(5) == 0 and 0 < ema.decay_at(6) < ema.decay_at(7) < ema.decay_at(10**6) == 0.99
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        EmaConfig(decay=1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "bf16", "zero_stage": 0}, "precision='bf16' with zero_stage=0.*Use zero_stage 1, 2 or 3"),
        ({"precision": "fp16", "zero_stage": 0, "use_gpu": True}, "precision='fp16' with zero_stage=0"),
        ({"precision": "fp16"}, "precision='fp16' with use_gpu=False.*Use precision='bf16'"),
        ({"offload": "optimizer"}, "offload='optimizer' with optimizer='adamw'.*Use optimizer='cpu_adamw'"),
        ({"optimizer": "cpu_adamw"}, "optimizer='cpu_adamw' with offload='none'.*Use optimizer='adamw'"),
        (
            {"offload": "optimizer", "optimizer": "cpu_adamw", "zero_stage": 0},
            "offload='optimizer' with zero_stage=0.*Use zero_stage 1, 2 or 3",
        ),
        (
            {"offload": "optimizer_and_weights", "optimizer": "cpu_adamw", "zero_stage": 2},
            "offload='optimizer_and_weights' with zero_stage=2.*Use zero_stage=3",
        ),
    ],
)
def test_engine_options_that_do_not_fit_are_refused_before_anything_starts(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"checkpoint_every": 60, "evaluate_every": 100},
            "evaluate_every=100 is not a multiple of checkpoint_every=60: an evaluation reads a checkpoint. "
            "Nearest that fits: evaluate_every=120, or checkpoint_every=20, or 0",
        ),
        ({"checkpoint_every": 60, "evaluate_every": 20}, "evaluate_every=60, or checkpoint_every=20"),
        ({"checkpoint_every": 500, "keep_every": 700}, "keep_every=700 is not a multiple of checkpoint_every=500"),
        ({"keep_best": 1, "evaluate_every": 0}, "keep_best=1 with evaluate_every=0.*evaluate_every=500"),
        ({"keep_best": 1, "keep_best_metric": ""}, "empty keep_best_metric"),
    ],
)
def test_what_needs_a_checkpoint_is_due_only_where_one_is_written(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_the_recipes_evaluate_and_keep_what_they_write():
    for recipe in (*AUTOENCODER.values(), *FINETUNE.values()):
        assert recipe.train.evaluate_every % recipe.train.checkpoint_every == 0
    assert TrainConfig(checkpoint_every=60, evaluate_every=0, keep_every=180).keep_every == 180


def test_a_missing_compiler_is_named_unless_the_optimizer_was_built_before(monkeypatch, tmp_path: Path):
    config = TrainConfig(optimizer="cpu_adamw", offload="optimizer")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    missing = missing_compiler(config)
    assert missing and "ninja and c++ cannot be found" in missing and "use optimizer='adamw'" in missing
    assert "\n" not in missing and missing_compiler(TrainConfig()) is None
    (tmp_path / "ninja").touch(mode=0o755)
    assert "and c++ cannot" in str(missing_compiler(config)) and "ninja and" not in str(missing_compiler(config))
    built = tmp_path / "extensions" / "cpu_adam"
    built.mkdir(parents=True)
    (built / "cpu_adam.so").touch()
    assert missing_compiler(config) is None


def test_a_task_names_the_metric_that_keeps_checkpoints_and_its_direction():
    config = TrainConfig(keep_best=1, keep_best_metric="pck@0.1", keep_best_lower_is_better=False)
    assert (config.retention.metric, config.retention.lower_is_better) == ("pck@0.1", False)
    assert TrainConfig().retention.lower_is_better
    assert "keep_best_lower_is_better" not in identity_values(TrainConfig()), "finished stages stay finished"
