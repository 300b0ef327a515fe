"""What trainings and batch jobs say when a cluster is too small."""


class InsufficientResourcesError(ValueError):
    """The cluster cannot hold what was asked for; says what is missing and what to lower."""
