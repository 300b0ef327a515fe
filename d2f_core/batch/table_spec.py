"""What a table job is: samples of a source in, rows of a table out. Light: the tasks that read and write import this,
and neither torch nor a model."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa


class TableJobError(ValueError):
    """A table job that cannot go on, with the reason and the fix."""


class TableSettings(Protocol):
    """The fields of a config that every table job has; those of its pool come from `AwaitedPoolConfig`."""

    @property
    def num_actors(self) -> int: ...
    @property
    def cpus_per_actor(self) -> int: ...
    @property
    def gpus_per_actor(self) -> float: ...
    @property
    def node_wait_seconds(self) -> int: ...

    @property
    def output(self) -> str:
        """Where the table is written; the same job again resumes, and does nothing once it is complete."""
        ...

    @property
    def rows_per_part(self) -> int:
        """Samples per chunk, which is one output file: what a killed task loses at most."""
        ...

    @property
    def max_quarantined_share(self) -> float:
        """Share of the samples that may be unusable before the job stops; duplicates do not count."""
        ...

    @property
    def num_readers(self) -> int:
        """Tasks that read and prepare at a time."""
        ...


@dataclass(frozen=True, kw_only=True)
class TableSpec(ABC):
    """Everything that decides the table's bytes. A kind of job is a subclass, found by name on every node."""

    NAME: ClassVar[str]
    """Of the job, in its progress lines."""
    KIND: ClassVar[str]
    """Of the table that it writes."""
    UNIT: ClassVar[str] = "rows"
    """What a sample is, for people: `images`."""
    FREE: ClassVar[frozenset[str]] = frozenset()
    """Inputs that the manifest tells and that change no byte."""

    config: TableSettings
    fingerprint: Mapping[str, Any]
    """What a reader of the table must match."""
    inputs: Mapping[str, Any]
    """What the table is made from, its `source` among them."""

    @abstractmethod
    def prepared_schema(self) -> pa.Schema:
        """Columns of a chunk on its way from the reading task to an actor: `sample_id`, `source_uri` and more."""

    @abstractmethod
    def identify(self, sample: Any) -> str:
        """The sample's id, by its content; of equal ones the first that can be used is kept.

        Raises:
            BadSampleError: it lacks a part.
        """

    @abstractmethod
    def prepare(self, sample: Any) -> dict[str, Any]:
        """The other columns of `prepared_schema`, decoded and cut to their shapes.

        Raises:
            BadSampleError: the sample cannot be used.
        """

    def identity(self) -> dict[str, Any]:
        """What must be equal for two jobs to write the same table; the cluster's size and batches are free."""
        inputs = {name: value for name, value in self.inputs.items() if name not in self.FREE}
        return json.loads(json.dumps({**inputs, "fingerprint": self.fingerprint}))
