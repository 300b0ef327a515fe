"""From samples to a table: Ray Data tasks read and prepare, a pool of actors makes the rows, tasks write.

Repeating the command resumes a killed job; the finished table is the same byte for byte.
"""

import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, cast

import ray
import ray.data

from d2f_core.batch.chunk_records import (
    JOB_NAME,
    PROGRESS,
    ChunkRecord,
    drop_duplicates,
    ledger,
    read_records,
    unfinished_shards,
)
from d2f_core.batch.chunks import LoadedActor, TableActor, prepare_shards, work_item, write_row
from d2f_core.batch.output import OutputError
from d2f_core.batch.resources import await_resources, rows_in_place
from d2f_core.batch.table_spec import TableJobError, TableSpec
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest, write_manifest
from d2f_core.data.quarantine import DUPLICATE, QUARANTINE_NAME, BadSample, reason_counts, write_quarantine
from d2f_core.data.ray_data import configure
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.identity import differences
from d2f_core.progress import Progress
from d2f_core.storage import join, list_names, read_bytes, remove_tree, write_bytes

logger = logging.getLogger(__name__)

# Fractions, as reading waits for the network and writing is short. As they differ from an actor's whole CPUs, Ray does
# not fuse reading and making into one process, so that decoding can run while the GPU is busy.
PREPARE_CPUS, WRITE_CPUS = 0.5, 0.25
MAX_INPUT_BLOCKS = 1000
BLOCK_BYTES = 2**20
"""A chunk of at least this many bytes is passed on at once instead of waiting for the shard's other chunks."""


@dataclass(frozen=True, kw_only=True)
class TableJob:
    """A checked table job that is ready to run."""

    spec: TableSpec
    source: SourcePlan
    """The source, split into shards."""
    actor: type[TableActor]
    """Class of the actors, which are constructed with `spec`."""


def make_table(job: TableJob) -> Manifest:
    """Write the missing parts of the table; needs a running Ray. A finished table is not changed.

    Raises:
        ValueError: the output belongs to another job, the cluster is too small, or no sample is usable.
    """
    spec, source = job.spec, job.source
    output = spec.config.output
    if manifest_exists(output):
        manifest = read_manifest(output)
        check_complete_table(spec, manifest)
        remove_tree(join(output, PROGRESS))
        logger.info("%s: complete with %d rows, nothing to do", output, manifest.num_rows)
        return manifest
    claim_output(spec)
    records = read_records(output)
    todo = unfinished_shards(len(source.shards), records)
    progress = _progress(job, records, todo)
    most = inf if source.num_rows is None else spec.config.max_quarantined_share * source.num_rows
    unusable = sum(record.unusable for record in records)
    with closing(run_chunks(job, todo)) as chunks:
        while unusable <= most and (record := next(chunks, None)):
            records.append(record)
            unusable += record.unusable
            progress.advance(record.read if source.num_rows is not None else int(record.last))
    if unusable > most:  # even if all remaining samples are usable
        bad = ledger(output, records)
        write_quarantine(output, bad)
        raise _too_many(spec, bad, sum(record.read for record in records))
    return finish_table(spec, records)


def _progress(job: TableJob, records: Sequence[ChunkRecord], todo: Mapping[int, Any]) -> Progress:
    spec, source = job.spec, job.source
    if source.num_rows is None:  # the number of samples in a tar, or of chosen rows, is not known in advance
        total = len(source.shards)
        unit = "tars" if source.kind == "webdataset" else "parts"
        return Progress(spec.NAME, total, unit, done=total - len(todo))
    return Progress(spec.NAME, source.num_rows, spec.UNIT, done=sum(record.read for record in records))


def run_chunks(job: TableJob, todo: Mapping[int, frozenset[int]]) -> Generator[ChunkRecord]:
    """Make the rows of the unfinished shards; yields one record per chunk once it is written.

    Raises:
        TableJobError: a chunk could not be made; says why.
    """
    for row in _rows(job, todo) if todo else ():
        if row["problem"] is not None:
            raise TableJobError(row["problem"])
        yield ChunkRecord.from_json(row["record"])


def _rows(job: TableJob, todo: Mapping[int, frozenset[int]]) -> Iterator[dict[str, Any]]:
    """Run the stages on the cluster; yields the row of `write_row` for each chunk."""
    spec, config = job.spec, job.spec.config
    actors = min(config.num_actors, len(todo))
    items = [work_item(number, job.source.shards[number], done) for number, done in todo.items()]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_INPUT_BLOCKS))
    dataset.context.target_max_block_size = BLOCK_BYTES
    configure(dataset)
    rows: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    dataset = dataset.map_batches(
        cast(Any, partial(prepare_shards, spec=spec)),
        compute=ray.data.TaskPoolStrategy(size=config.num_readers),
        num_cpus=PREPARE_CPUS,
        **rows,
    )
    dataset = dataset.map_batches(
        cast(Any, LoadedActor),
        fn_constructor_args=(job.actor, spec),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
        memory=config.each_actor["memory"] or None,
        **rows,
    )
    dataset = dataset.map_batches(
        cast(Any, partial(write_row, output=config.output, row_group_rows=spec.row_group_rows)),
        compute=ray.data.TaskPoolStrategy(size=actors),
        num_cpus=WRITE_CPUS,
        **rows,
    )
    held = await_resources(
        actors,
        config.each_actor,
        others={"CPU": PREPARE_CPUS + WRITE_CPUS},
        least=actors,
        seconds=config.node_wait_seconds,
    )
    yield from rows_in_place(dataset, held)


def claim_output(spec: TableSpec) -> None:
    """Record the job at its output, or check that the job begun there is this one.

    Raises:
        OutputError: another job began there (names the differences), or the output holds other files.
    """
    place = join(spec.config.output, PROGRESS, JOB_NAME)
    if (names := list_names(spec.config.output)) and PROGRESS not in names:
        raise OutputError(
            f"{spec.config.output!r} is not empty: it holds {', '.join(names[:5])}. Give another output, or remove "
            "them."
        )
    try:
        write_bytes(place, json.dumps(spec.identity(), indent=1, sort_keys=True).encode(), exclusive=True)
    except FileExistsError:
        _refuse_other(spec, json.loads(read_bytes(place)), "is an unfinished table")


def begun_identity(output: str) -> dict[str, Any] | None:
    """The identity of the finished or unfinished table at an output; None where no table was begun."""
    if manifest_exists(output):
        manifest = read_manifest(output)
        return {**manifest.inputs, "fingerprint": manifest.fingerprint}
    try:
        return json.loads(read_bytes(join(output, PROGRESS, JOB_NAME)))
    except FileNotFoundError:
        return None


def check_complete_table(spec: TableSpec, manifest: Manifest) -> None:
    """Raise OutputError if the finished table at the output differs from what this job would write."""
    if manifest.kind != spec.KIND:
        raise OutputError(f"{spec.config.output!r} holds a table of {manifest.kind}. Give another output.")
    there = {**manifest.inputs, "fingerprint": manifest.fingerprint}
    _refuse_other(spec, there, "is a complete table")


def _refuse_other(spec: TableSpec, there: Mapping[str, Any], what: str) -> None:
    if changed := differences(_counted_values(spec, there), _counted_values(spec, spec.identity())):
        raise OutputError(
            f"{spec.config.output!r} {what} of another job: {'; '.join(changed)}. Give another output, or remove it."
        )


def _counted_values(spec: TableSpec, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and fingerprint in one mapping, without the spec's `FREE` inputs."""
    values = {**identity, **identity.get("fingerprint", {})}
    return {name: value for name, value in values.items() if name != "fingerprint" and name not in spec.FREE}


def finish_table(spec: TableSpec, records: Sequence[ChunkRecord]) -> Manifest:
    """Drop duplicate samples, write the ledger, and write the manifest, which completes the table.

    Raises:
        TableJobError: no sample is usable, or more are unusable than allowed.
    """
    output = spec.config.output
    records = drop_duplicates(output, records, row_group_rows=spec.row_group_rows)
    files = tuple(record.file for record in records if record.file is not None)
    bad = ledger(output, records)
    write_quarantine(output, bad)
    unusable = sum(record.unusable for record in records)
    duplicates = reason_counts(bad).get(DUPLICATE, 0)
    counts = {
        "read": sum(record.read for record in records),
        "written": sum(file.rows for file in files),
        "quarantined": unusable + duplicates,
        "duplicates": duplicates,
    }
    reasons = _counted(bad)
    if not counts["written"]:
        raise TableJobError(
            f"None of the {counts['read']} samples in {spec.inputs['source']!r} can be used ({reasons or 'empty'}). "
            f"The reasons are in {join(output, QUARANTINE_NAME)!r}."
        )
    if unusable > spec.config.max_quarantined_share * counts["read"]:
        raise _too_many(spec, bad, counts["read"])
    manifest = Manifest(
        kind=spec.KIND,
        files=files,
        fingerprint=dict(spec.fingerprint),
        inputs=dict(spec.inputs),
        counts={**counts, **spec.further_counts(files)},
    )
    write_manifest(output, manifest)
    remove_tree(join(output, PROGRESS))
    logger.info(
        "%s: %d %s read, %d written, %d quarantined%s",
        output, counts["read"], spec.UNIT, counts["written"], counts["quarantined"], f" ({reasons})" if reasons else "",
    )  # fmt: skip
    return manifest


def _counted(bad: Sequence[BadSample]) -> str:
    return ", ".join(f"{count} {code}" for code, count in reason_counts(bad).items())


def _too_many(spec: TableSpec, bad: Sequence[BadSample], read: int) -> TableJobError:
    """The error for more unusable samples than allowed."""
    lost = [sample for sample in bad if sample.code != DUPLICATE]
    shown = "; ".join(f"{sample.source_uri}: {sample.reason}" for sample in lost[:3])
    count = sum(sample.rows for sample in lost)
    return TableJobError(
        f"{count} of the {read} samples read from {spec.inputs['source']!r} cannot be used ({_counted(lost)}), "
        f"more than max_quarantined_share={spec.config.max_quarantined_share:g} allows. The first: "
        f"{shown}. All are in {join(spec.config.output, QUARANTINE_NAME)!r}. Check the source; or raise the limit, and "
        "the same command goes on from here."
    )
