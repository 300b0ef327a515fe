"""The gate is right as often as it says: simulated evaluations of made-up features, through the gate's own code."""

import pytest

from benchmarks.gate_calibration import made_up, simulate

POOL = made_up(prompts=400, dimensions=6, noises=(0.5, 1.1))
PROMPTS, REPLICATES = 200, 40


def passed(kind: str, simulations: int, bias: float = 0.0) -> float:
    found = [simulate(POOL, PROMPTS, REPLICATES, kind, bias, seed)[0].passed for seed in range(simulations)]
    return sum(found) / simulations


def test_of_200_evaluations_of_equal_models_hardly_one_passes() -> None:
    assert passed("equal", 200) <= 0.03


def test_a_model_that_is_better_by_one_detectable_difference_mostly_passes() -> None:
    pilot = [simulate(POOL, PROMPTS, REPLICATES, "better", 0.5, seed) for seed in range(20)]
    detectable = sum(verdict.rules[1].detectable or 0 for verdict, _ in pilot) / len(pilot)
    difference = -sum(difference for _, difference in pilot) / len(pilot)
    assert 0 < detectable < difference, "or the pool has no such pair of models"
    assert passed("better", 60, bias=0.5 * detectable / difference) >= 0.8


@pytest.mark.parametrize(
    ("kind", "words"), [("memorising", "lie no nearer to training images"), ("failing", "fails on at most")]
)
def test_a_model_that_repeats_its_training_or_fails_on_a_prompt_in_a_hundred_is_refused(kind: str, words: str) -> None:
    found = [simulate(POOL, PROMPTS, REPLICATES, kind, 0.5, seed)[0] for seed in range(20)]
    assert not any(verdict.passed for verdict in found)
    assert all(words in verdict.reason for verdict in found)
    assert kind == "memorising" or all(sum(not rule.holds for rule in verdict.rules) == 1 for verdict in found)
