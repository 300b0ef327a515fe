"""Why a sample is left out of a table."""


class BadSampleError(ValueError):
    """A sample that cannot be used; the message, `code: detail`, is the reason in the ledger."""
