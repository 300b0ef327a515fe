"""The ledger of samples that were left out, each with its reason, so that nothing is lost without a trace."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.table_versions import newest_version, versioned
from d2f_core.storage import arrow_filesystem, join, write_bytes

QUARANTINE_NAME = "quarantine.parquet"
LINES_AT_ONCE = 100_000
"""Most lines of a ledger that are in memory as Python objects."""

DUPLICATE = "duplicate"
"""Code of the reason that loses no data: the same sample is already in the table."""

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("sample_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that was left out."""

    source_uri: str
    sample_id: str | None
    """None when the image or the caption that determine the id is missing."""
    reason: str
    """A code and a detail: `too_small: 20x30 px, the short side must be at least 64`."""
    rows: int = 1
    """Number of samples that the entry stands for: the rest of a shard when a file cannot be read any further."""

    @property
    def code(self) -> str:
        return self.reason.partition(":")[0]


def write_quarantine(uri: str, bad: Iterable[BadSample], version: int = 1) -> int:
    """Write the ledger of a version of the table at `uri`, also when it is empty, so that the file always exists.

    Returns:
        The number of its lines.
    """
    sink, count, lines = pa.BufferOutputStream(), 0, iter(bad)
    with pq.ParquetWriter(sink, QUARANTINE_SCHEMA) as writer:
        # At least one row group, as of a table that is written in one piece.
        while (part := list(itertools.islice(lines, LINES_AT_ONCE))) or not count:
            writer.write_table(pa.Table.from_pylist([asdict(sample) for sample in part], QUARANTINE_SCHEMA))
            count += len(part)
            if len(part) < LINES_AT_ONCE:
                break
    write_bytes(join(uri, versioned(QUARANTINE_NAME, version)), sink.getvalue().to_pybytes())
    return count


def read_quarantine(uri: str) -> list[BadSample]:
    """The ledger of the table at `uri`, of its newest version. Raises FileNotFoundError when there is none."""
    filesystem, path = arrow_filesystem(join(uri, versioned(QUARANTINE_NAME, newest_version(uri))))
    return [BadSample(**row) for row in pq.read_table(path, filesystem=filesystem).to_pylist()]


def reason_counts(bad: Iterable[BadSample]) -> dict[str, int]:
    """Number of samples per reason code, most frequent first."""
    counts = Counter[str]()
    for sample in bad:
        counts[sample.code] += sample.rows
    return dict(counts.most_common())
