"""The error of trainings and batch jobs on a cluster that is too small."""


class InsufficientResourcesError(ValueError):
    """The cluster has too few resources for the request; the message says what is missing and what to lower."""
