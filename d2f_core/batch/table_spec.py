"""What a table job is: samples of a source in, rows of a table out. Imports neither torch nor a model, because the
tasks that read and write import this module."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from d2f_core.data.manifest import TableFile
from d2f_core.data.schema import ROW_GROUP_ROWS


class TableJobError(ValueError):
    """A table job cannot continue; the message gives the reason and the fix."""


class TableSettings(Protocol):
    """Config fields common to all table jobs; those of the pool come from `AwaitedPoolConfig`."""

    @property
    def num_actors(self) -> int: ...
    @property
    def cpus_per_actor(self) -> int: ...
    @property
    def gpus_per_actor(self) -> float: ...
    @property
    def each_actor(self) -> dict[str, float]: ...
    @property
    def node_wait_seconds(self) -> int: ...

    @property
    def output(self) -> str:
        """Where the table is written; repeating the job resumes it, adds a version if the source of a table that grows
        has changed, and does nothing once it is complete."""
        ...

    @property
    def rows_per_part(self) -> int:
        """Samples per chunk (one output file), the most that is lost when a task is killed."""
        ...

    @property
    def max_quarantined_share(self) -> float:
        """Largest share of unusable samples before the job stops; duplicates do not count."""
        ...

    @property
    def num_readers(self) -> int:
        """Number of parallel tasks that read and prepare samples."""
        ...


@dataclass(frozen=True, kw_only=True)
class TableSpec(ABC):
    """Everything that determines the table's bytes. Each kind of job is a subclass, which every node can import by
    name.
    """

    NAME: ClassVar[str]
    """Name of the job in its progress lines."""
    KIND: ClassVar[str]
    """Kind of the table that the job writes."""
    UNIT: ClassVar[str] = "rows"
    """Unit of the samples in messages, such as `images`."""
    FREE: ClassVar[frozenset[str]] = frozenset()
    """Names of inputs that the manifest records but that do not affect the table's bytes."""

    config: TableSettings
    fingerprint: Mapping[str, Any]
    """Properties that a reader of the table must match."""
    inputs: Mapping[str, Any]
    """What the table is made from, including its `source`."""

    @abstractmethod
    def prepared_schema(self) -> pa.Schema:
        """Schema of a prepared chunk, which reading tasks send to actors: `sample_id`, `source_uri` and more."""

    @abstractmethod
    def identify(self, sample: Any) -> str:
        """The sample's id, a hash of its content; of samples with equal ids, the first usable one is kept.

        Raises:
            BadSampleError: the sample lacks a part.
        """

    @abstractmethod
    def prepare(self, sample: Any) -> dict[str, Any]:
        """The remaining columns of `prepared_schema`, decoded and in their final shapes.

        Raises:
            BadSampleError: the sample cannot be used.
        """

    @property
    def grows(self) -> bool:
        """Whether a finished table gets a further version when its source has changed: rows of the ids that it has are
        taken over. Only where an id is the hash of all that a row is made of, or a changed sample would pass for an
        unchanged one.
        """
        return False

    @property
    def max_removed_share(self) -> float:
        """Largest share of a table's rows that a further version may lose."""
        return 1.0

    @property
    def row_group_rows(self) -> int:
        """Rows per row group of the table's files, the smallest piece that a reader can fetch; fewer where rows are
        large (see `manifest.rows_per_group`). It affects the files' bytes: whatever it depends on belongs to `inputs`.
        """
        return ROW_GROUP_ROWS

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that the job writes below its output, where rows are of several schemas, such as image
        sizes; empty: the output is the one table.
        """
        return ()

    def table_of(self, row: Mapping[str, Any]) -> str:
        """Name of the table of a prepared row; empty: the output itself."""
        del row
        return ""

    def of_table(self, name: str) -> "TableSpec":
        """The specification of one of `tables`, whose rows are of one schema."""
        del name
        return self

    def further_counts(self, files: Sequence[TableFile]) -> dict[str, int]:
        """Counts by name that the manifest of the finished table has beside those of its samples.

        Args:
            files: the table's, already written.
        """
        del files
        return {}

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two jobs to write the same table; cluster and batch size are not among
        them.
        """
        inputs = {name: value for name, value in self.inputs.items() if name not in self.FREE}
        return json.loads(json.dumps({**inputs, "fingerprint": self.fingerprint}))
