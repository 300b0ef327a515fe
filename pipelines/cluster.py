"""Connects a job to Ray, and refuses local paths that the nodes do not share."""

from collections.abc import Mapping


def connect(*, reads: Mapping[str, str], writes: Mapping[str, str]) -> None:
    """Connect to the cluster that the environment names, or start Ray on this machine.

    Args:
        reads: field of the config -> URI or path that workers read.
        writes: the same of what is written.

    Raises:
        NotSharedError: a local path that not all nodes share.
    """
    import ray  # a dry run needs none

    from d2f_core.shared_paths import check_shared

    ray.init(ignore_reinit_error=True)
    check_shared(reads=reads, writes=writes)
