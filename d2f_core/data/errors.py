"""Why a sample is left out of a table."""


class BadSampleError(ValueError):
    """A sample that cannot be used; the message is a code and a detail, the ledger's reason."""
