"""The output of a batch job: claimed by one job, refused to others, with the parts of its index that exist.

OUTPUT/plan.json               what decides the results
OUTPUT/index/part-*.parquet    one row per result, with an `error` where there is none
OUTPUT/manifest.json           written last
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import (
    Manifest,
    TableFile,
    describe_file,
    manifest_exists,
    read_file,
    read_manifest,
    write_manifest,
)
from d2f_core.identity import differences
from d2f_core.storage import join, list_names, read_bytes, write_bytes

S = TypeVar("S")
T = TypeVar("T")
PLAN_NAME = "plan.json"
INDEX = "index"
KIND = "generations"
"""Kind of the index table in its manifest, whatever the job makes."""
READ_THREADS = 16
AHEAD_BYTES = 16 * 2**20
"""Files that are read ahead are together about as large; what is decoded of them takes several times as much."""


class OutputError(ValueError):
    """The output holds something other than this job's results."""


def claim(output: str, identity: Mapping[str, Any], **about: Any) -> None:
    """Write the plan at the output, or check that the existing plan is the same.

    Args:
        identity: JSON values.
        about: further values in the plan that are not part of the identity.

    Raises:
        OutputError: the output belongs to another job; names what differs.
    """
    place = join(output, PLAN_NAME)
    try:
        text = json.dumps({**identity, **about}, indent=1, sort_keys=True)
        write_bytes(place, text.encode(), exclusive=True)
    except FileExistsError:
        there = json.loads(read_bytes(place))
        refuse_other(output, {name: value for name, value in there.items() if name not in about}, identity)


def refuse_other(output: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError, naming the differences, if the identity stored at the output (`there`) differs from `now`."""
    if different := differences(there, now):
        raise OutputError(
            f"{output!r} holds the results of another job ({'; '.join(different)}). Give another output, or remove "
            "that one."
        )


def part_name(number: int, table: str = INDEX) -> str:
    """Path of a part of a table, relative to the output."""
    return f"{table}/part-{number:06d}.parquet"


@dataclass(frozen=True)
class IndexPart:
    """The stored part of the index from one unit of work."""

    file: TableFile
    failed: int
    """Number of rows with an error."""
    metadata: Mapping[bytes, bytes]
    """Metadata of the file's schema."""

    @classmethod
    def read(cls, output: str, number: int) -> "IndexPart":
        """Read a part that an earlier run wrote."""
        name = part_name(number)
        data = read_bytes(join(output, name))
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            failed = file.metadata.num_rows - file.read(["error"])["error"].null_count
            return cls(describe_file(name, data), failed, file.schema_arrow.metadata or {})


class IndexedOutput:
    """The output of a job whose units of work, numbered from 0, each write one part of the index."""

    def __init__(self, uri: str, identity: Mapping[str, Any], num_parts: int, **about: Any) -> None:
        """Claim the output, and read the parts that exist.

        Args:
            identity: values that determine the results; compared as JSON, so a tuple equals the list that was stored.
            about: further values in the plan.

        Raises:
            OutputError: the output belongs to another job; names what differs.
        """
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        claim(uri, self._identity, **about)
        self.uri, self.num_parts = uri, num_parts
        self.manifest: Manifest | None = read_manifest(uri) if manifest_exists(uri) else None
        """Manifest of a finished output; None before."""
        self.parts: dict[int, IndexPart] = {}
        self.rows = 0
        """Rows in the existing parts."""
        self.failed = 0
        """Rows with an error in the existing parts."""
        if self.manifest:
            refuse_other(uri, self.manifest.fingerprint, self._identity)
        else:
            for number, part in _parts_there(uri, num_parts).items():
                self.add(number, part)

    def add(self, number: int, part: IndexPart) -> None:
        """Count a unit of work as done."""
        self.parts[number] = part
        self.rows += part.file.rows
        self.failed += part.failed

    @property
    def missing(self) -> list[int]:
        """Numbers of the unfinished units of work."""
        return [] if self.manifest else [number for number in range(self.num_parts) if number not in self.parts]

    def in_order(self) -> list[IndexPart]:
        """All parts by number; raises KeyError when one is missing."""
        return [self.parts[number] for number in range(self.num_parts)]

    def finish(self, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> Manifest:
        """Write the manifest, which declares the output complete."""
        files = tuple(part.file for part in self.in_order())
        self.manifest = Manifest(
            kind=KIND, files=files, fingerprint=self._identity, inputs=dict(inputs), counts=dict(counts)
        )
        write_manifest(self.uri, self.manifest)
        return self.manifest


def _parts_there(output: str, count: int) -> dict[int, IndexPart]:
    names = set(list_names(join(output, INDEX)))
    there = [number for number in range(count) if part_name(number).rsplit("/", 1)[-1] in names]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(there, pool.map(lambda number: IndexPart.read(output, number), there), strict=True))


def table_file(text: str) -> Any:
    """The TableFile that an actor sent as JSON; None if it sent none."""
    values = json.loads(text)
    return values and TableFile.from_json(values)


def read_index(output: str) -> pa.Table:
    """The whole index of a finished job, in the order of its parts; a column that a part lacks is null there."""
    return pa.concat_tables(stream_index(output), promote_options="default")


def stream_index(output: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The index of a finished job, one part after the other; whoever stops early has read little more than was needed.

    Args:
        columns: their names; None: all.
    """
    files = read_manifest(output).files
    chosen = None if columns is None else list(columns)
    largest = max((file.size for file in files), default=1)
    return map_ahead(
        lambda file: pq.read_table(pa.BufferReader(read_file(output, file)), columns=chosen),
        files,
        threads_for(largest),
    )


def threads_for(file_bytes: int) -> int:
    """How many files of this size are read at once: many small ones, whose time is the storage's answer, few large
    ones."""
    return max(1, min(READ_THREADS, AHEAD_BYTES // max(1, file_bytes)))


def map_ahead(function: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """`map` in threads: the results in the order of the items, of which at most `threads` are begun and not yet given.

    An executor's own `map` begins all at once, and so holds the results of the fast ones until the slow ones are done.
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
