"""From samples to a table: Ray Data tasks read and prepare, a pool of actors makes the rows, tasks write.

Repeating the command resumes a killed job; the finished table is the same byte for byte.
"""

import logging
from collections import defaultdict
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data

from d2f_core.batch.chunk_records import (
    PROGRESS,
    ChunkRecord,
    drop_duplicates,
    ledger,
    read_records,
    unfinished_shards,
)
from d2f_core.batch.chunks import LoadedActor, TableActor, prepare_shards, work_item, write_row
from d2f_core.batch.growth import GROWING, KnownIds, begun_growth, compare, foreseen, growing_spec, row_ids
from d2f_core.batch.resources import await_resources, rows_in_place
from d2f_core.batch.table_claim import (
    begun_identity,
    claim_output,
    refuse_other,
    refuse_strange,
    source_has_changed,
)
from d2f_core.batch.table_spec import TableJobError, TableSpec
from d2f_core.data.manifest import Manifest, TableFile, manifest_exists, read_manifest, write_manifest
from d2f_core.data.quarantine import DUPLICATE, QUARANTINE_NAME, BadSample, reason_counts, write_quarantine
from d2f_core.data.ray_data import configure
from d2f_core.data.size_tables import join_tables
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.data.table_versions import newest_version
from d2f_core.progress import Progress
from d2f_core.storage import join, remove_tree

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
    known: Container[str] = ()
    """Ids of the samples that a growing table has, which are not made again."""


def make_table(job: TableJob) -> Manifest:
    """Write the missing parts of the table, or a further version if its source has changed; needs a running Ray. What a
    finished table consists of is not changed.

    Raises:
        ValueError: the output belongs to another job, the cluster is too small, or no sample is usable.
    """
    spec, output = job.spec, job.spec.config.output
    if not manifest_exists(output):
        return finish_table(spec, _made_chunks(job))
    manifest = read_manifest(output)
    if source_has_changed(spec, manifest):
        return _grow(job, manifest)
    for place in (PROGRESS, GROWING):
        remove_tree(join(output, place))
    logger.info("%s: complete with %d rows, nothing to do", output, manifest.num_rows)
    return manifest


def _grow(job: TableJob, before: Manifest) -> Manifest:
    """Make the rows of new samples, and write the version that has them and no longer those that are gone."""
    spec, output, version = job.spec, job.spec.config.output, newest_version(job.spec.config.output) + 1
    growing = growing_spec(spec, before)
    place = growing.config.output
    if begun_growth(place, before) is None:
        remove_tree(place)
    records = _made_chunks(replace(job, spec=growing, known=KnownIds(row_ids(output, before))))
    growth = compare(spec, before, version, place, records)
    write_quarantine(place, growth.bad)
    counts = _counts(growing, growth.records, growth.bad, sum(file.rows for file in growth.files))
    counts |= {"new": growth.new, "removed": growth.removed, "unchanged": growth.unchanged}
    counts |= spec.further_counts(growth.files)
    manifest = Manifest(
        kind=spec.KIND,
        files=growth.files,
        fingerprint=dict(spec.fingerprint),
        inputs=dict(spec.inputs),
        counts=counts,
    )
    write_quarantine(output, growth.bad, version)
    write_manifest(output, manifest, version)
    remove_tree(place)
    logger.info("%s: %s: version %d", output, growth, version)
    return manifest


def _made_chunks(job: TableJob) -> list[ChunkRecord]:
    """Make the missing chunks; returns the records of all.

    Raises:
        ValueError: the output belongs to another job, the cluster is too small, or too many samples are unusable.
    """
    spec, source, output = job.spec, job.source, job.spec.config.output
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
            done = record.last and record.part == 0
            progress.advance(record.read if source.num_rows is not None else int(done))
    if unusable > most:  # even if all remaining samples are usable
        bad = ledger(output, records)
        write_quarantine(output, bad)
        raise _too_many(spec, bad, sum(record.read for record in records))
    return records


def _progress(job: TableJob, records: Sequence[ChunkRecord], todo: Mapping[int, Any]) -> Progress:
    spec, source = job.spec, job.source
    if source.num_rows is None:  # the number of samples in a tar, or of chosen rows, is not known in advance
        total = len(source.shards)
        unit = "tars" if source.kind == "webdataset" else "parts"
        return Progress(spec.NAME, total, unit, done=total - len(todo))
    return Progress(spec.NAME, source.num_rows, spec.UNIT, done=sum(record.read for record in records))


def run_chunks(job: TableJob, todo: Mapping[int, Mapping[int, int]]) -> Generator[ChunkRecord]:
    """Make the rows of the unfinished shards; yields one record per chunk once it is written.

    Raises:
        TableJobError: a chunk could not be made; says why.
    """
    for row in _rows(job, todo) if todo else ():
        if row["problem"] is not None:
            raise TableJobError(row["problem"])
        yield ChunkRecord.from_json(row["record"]).without_places()


def _rows(job: TableJob, todo: Mapping[int, Mapping[int, int]]) -> Iterator[dict[str, Any]]:
    """Run the stages on the cluster; yields the row of `write_row` for each chunk."""
    spec, config = job.spec, job.spec.config
    actors = min(config.num_actors, len(todo))
    items = [work_item(number, job.source.shards[number], done) for number, done in todo.items()]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_INPUT_BLOCKS))
    dataset.context.target_max_block_size = BLOCK_BYTES
    configure(dataset)
    rows: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    dataset = dataset.map_batches(
        cast(Any, partial(_prepare, spec=spec, known=ray.put(job.known))),
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


def check_output(job: TableJob) -> None:
    """Refuse at the prompt what `make_table` would refuse when it runs, and say what it will do to a finished table.

    Raises:
        OutputError: the output holds a table of another job, finished or not (names the differences), or other files.
    """
    spec, output = job.spec, job.spec.config.output
    if not manifest_exists(output):
        if begun := begun_identity(output):
            refuse_other(spec, begun, "is an unfinished table")
        else:
            refuse_strange(output)
        return
    before = read_manifest(output)
    if source_has_changed(spec, before):
        growing = growing_spec(spec, before)
        if begun := begun_growth(growing.config.output, before):
            refuse_other(growing, begun, "is an unfinished version")
        version, told = newest_version(output), foreseen(spec, job.source, before)
        logger.info("%s: the source has changed since version %d: %s; version %d", output, version, told, version + 1)


def _prepare(rows: pa.Table, *, spec: TableSpec, known: ray.ObjectRef) -> Iterator[pa.Table]:
    yield from prepare_shards(rows, spec=spec, known=ray.get(known))


def finish_table(spec: TableSpec, records: Sequence[ChunkRecord]) -> Manifest:
    """Drop duplicate samples, write the ledger, and write the manifest, which completes the table.

    Raises:
        TableJobError: no sample is usable, or more are unusable than allowed.
    """
    output = spec.config.output
    records = drop_duplicates(output, records, row_group_rows=spec.row_group_rows)
    bad = ledger(output, records)
    write_quarantine(output, bad)
    files = tuple(record.file for record in records if record.file is not None)
    counts = _counts(spec, records, bad, sum(file.rows for file in files)) | spec.further_counts(files)
    manifest = _declare(spec, records, counts)
    remove_tree(join(output, PROGRESS))
    reasons = _counted(bad)
    logger.info(
        "%s: %d %s read, %d written, %d quarantined%s",
        output, counts["read"], spec.UNIT, counts["written"], counts["quarantined"], f" ({reasons})" if reasons else "",
    )  # fmt: skip
    return manifest


def _declare(spec: TableSpec, records: Sequence[ChunkRecord], counts: dict[str, int]) -> Manifest:
    """Write the manifest of the table; of several, those that have rows, and then the one of all."""
    output, files = spec.config.output, defaultdict[str, list[TableFile]](list)
    for record in records:
        if record.file is not None:
            files[record.table].append(replace(record.file, path=record.file.path.rpartition("/")[2]))
    described = {"kind": spec.KIND, "fingerprint": dict(spec.fingerprint), "inputs": dict(spec.inputs)}
    manifest = Manifest(files=tuple(files[""]), counts=counts, **described)
    if spec.tables:
        tables = [(name, Manifest(files=tuple(files[name]), **described)) for name in spec.tables if files[name]]
        for name, table in tables:
            write_manifest(join(output, name), table)
        manifest = join_tables(tables, manifest)
        found = ", ".join(f"{rows} in {name}" for name, rows in manifest.buckets)
        unused = ", ".join(name for name in spec.tables if not files[name])
        logger.info("%s: %s%s", output, found, f"; none in {unused}, which are not written" if unused else "")
    write_manifest(output, manifest)
    return manifest


def _counts(spec: TableSpec, records: Sequence[ChunkRecord], bad: Sequence[BadSample], written: int) -> dict[str, int]:
    """The manifest's counts.

    Raises:
        TableJobError: no sample is usable, or more are unusable than allowed.
    """
    read, duplicates = sum(record.read for record in records), reason_counts(bad).get(DUPLICATE, 0)
    unusable = sum(record.unusable for record in records)
    if not written:
        raise TableJobError(
            f"None of the {read} samples in {spec.inputs['source']!r} can be used ({_counted(bad) or 'empty'}). "
            f"The reasons are in {join(spec.config.output, QUARANTINE_NAME)!r}."
        )
    if unusable > spec.config.max_quarantined_share * read:
        raise _too_many(spec, bad, read)
    return {"read": read, "written": written, "quarantined": unusable + duplicates, "duplicates": duplicates}


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
