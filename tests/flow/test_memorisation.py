"""A model that repeats its training images is found out, one that has learned the distribution is not."""

import numpy as np
import pytest

from d2f_core.evaluation.config import GateConfig
from d2f_core.flow.evaluate.memorisation import memorisation_rule, nearest_training

DIMENSIONS = 8


def drawn(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIMENSIONS))


def repeated(training: np.ndarray, count: int, seed: int, noise: float = 0.1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return training[generator.integers(0, len(training), count)] + noise * generator.normal(size=(count, DIMENSIONS))


def test_a_model_that_repeats_its_training_images_is_found_out() -> None:
    training, held = drawn(300, 0), drawn(60, 1)
    found = nearest_training(repeated(training, 200, 2), training, held)
    assert found.share > 0.97 and found.expected == pytest.approx(300 / 360) and found.p_value < 0.001
    assert (found.made, found.training, found.held_out) == (200, 300, 60)
    rule = memorisation_rule(found, GateConfig())
    assert not rule.holds and rule.applied and "300 training images, 60 are held out" in rule.rule


def test_one_that_learned_the_distribution_passes_as_often_as_the_level_says() -> None:
    """The p-value is uniform: 40 trainings with other images each."""
    found = [
        nearest_training(drawn(150, 3 * seed), drawn(200, 3 * seed + 1), drawn(50, 3 * seed + 2)).p_value
        for seed in range(40)
    ]
    assert sum(value < 0.01 for value in found) <= 2 and 0.3 < float(np.mean(found)) < 0.7
    assert memorisation_rule(nearest_training(drawn(150, 0), drawn(200, 1), drawn(50, 2)), GateConfig()).holds


def test_repeating_held_out_images_is_no_memorising() -> None:
    training, held = drawn(100, 0), drawn(100, 1)
    assert nearest_training(repeated(held, 80, 2), training, held).p_value > 0.99


def test_an_image_that_is_in_both_sets_counts_as_held_out() -> None:
    same = drawn(30, 0)
    assert nearest_training(same, same, same).share == 0


def test_without_training_images_the_rule_is_named_as_not_applied() -> None:
    rule = memorisation_rule("no table of training images is given", GateConfig())
    assert rule.holds and not rule.applied
    assert rule.rule == "memorisation: not applied, no table of training images is given"


def test_what_few_images_cannot_show_is_said_and_not_called_kept() -> None:
    """Of 2,064 real images 64 are held out: 64 copies may all lie near training images by chance."""
    training, held = drawn(2000, 0), drawn(64, 1)
    few = nearest_training(repeated(training, 64, 2), training, held)
    rule = memorisation_rule(few, GateConfig())
    assert few.least_p > 0.1 and rule.holds and not rule.applied
    assert "64 images, 64 held out and 2,000 trained on cannot show" in rule.rule and "about 148 images" in rule.rule
    many = nearest_training(repeated(training, 400, 2), training, held)
    assert many.least_p < 1e-4 and not memorisation_rule(many, GateConfig()).holds


def test_the_rule_can_be_turned_off() -> None:
    training = drawn(300, 0)
    found = nearest_training(repeated(training, 200, 2), training, drawn(60, 1))
    assert not memorisation_rule(found, GateConfig(memorised=0)).applied
