"""Selects one checkpoint of a run: by its step, or as the newest or the best."""

from d2f_core.train.checkpoint import Checkpoint, CheckpointError, list_checkpoints
from d2f_core.train.config import Which
from d2f_core.train.retention import best_first, metric_of
from d2f_core.train.retention_rules import Retention


def select(output: str, which: Which, retention: Retention) -> Checkpoint:
    """The checkpoint of a step (from the last of several attempts), or the newest or best of all.

    Args:
        output: output directory of the run.
        retention: its `metric` determines the best.

    Raises:
        CheckpointError: there is no such checkpoint; lists those that exist.
    """
    complete = list_checkpoints(output)
    if not complete:
        raise CheckpointError(
            f"{output} holds no complete checkpoint. Give the output of a training that has written one."
        )
    steps = ", ".join(dict.fromkeys(str(checkpoint.manifest.step) for checkpoint in complete))
    if which == "newest":
        return complete[-1]
    if which == "best":
        metric = {checkpoint.uri: metric_of(checkpoint.uri, retention.metric) for checkpoint in complete}
        if not (ranked := best_first(complete, retention, metric)):
            raise CheckpointError(
                f"{output}: none of the checkpoints of step {steps} was evaluated with a {retention.metric}. Give one "
                "of these steps, or 'newest'."
            )
        return ranked[0]
    if not (found := [checkpoint for checkpoint in complete if checkpoint.manifest.step == which]):
        raise CheckpointError(
            f"{output} holds no complete checkpoint of step {which}. There are those of step {steps}; keep more with "
            "--train.keep-every."
        )
    return found[-1]
