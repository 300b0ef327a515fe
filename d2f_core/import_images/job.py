"""Imports images: one table of all that are usable, parted into two, and a page that shows what came in.

OUTPUT/train/  OUTPUT/test/     image tables; the manifests are written last
OUTPUT/report.html              what came in, for people; summary.json holds its figures
OUTPUT/duplicates.jsonl         images that look like another one
OUTPUT/quarantine.parquet       what was left out, each with its reason
OUTPUT/_all/                    all usable images, until both tables are there
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import TableJob, make_table
from d2f_core.data.datasets.generated_table import GeneratedTable, generate_table
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.data.quarantine import QUARANTINE_NAME
from d2f_core.data.sources.images import plan_images
from d2f_core.identity import differences, identity_values
from d2f_core.import_images.config import ImportImagesConfig, ImportImagesError
from d2f_core.import_images.parting import SIDES, Parting, Side, part_rows, read_known, side_parts, write_side_part
from d2f_core.import_images.report import write_report
from d2f_core.import_images.spec import ImportSpec, Passing
from d2f_core.storage import check_reachable, join, list_names, read_bytes, remove_tree, write_bytes

ALL = "_all"
SUMMARY, DUPLICATES = "summary.json", "duplicates.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """A checked import that is ready to run."""

    config: ImportImagesConfig
    table: TableJob
    """Makes the table of all usable images."""
    inputs: Mapping[str, Any]
    """What both tables are made from."""

    def place(self, side: Side) -> str:
        return join(self.config.output, side)


def check_import(config: ImportImagesConfig) -> ImportJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage or source, or other tables at the output; one line each.
    """
    for name, value in (("source.uri", config.source.uri), ("output", config.output)):
        if not value:
            raise ImportImagesError(f"{name} is empty. Give --{name} URI.")
    if f"{config.output.rstrip('/')}/".startswith(f"{config.source.uri.rstrip('/')}/"):
        raise ImportImagesError(f"output={config.output!r} lies inside the source. Put it beside it.")
    check_reachable(config.source.uri)
    check_reachable(config.output, write=True)
    planned = plan_images(config.source, rows_per_shard=config.rows_per_part)
    made_from = {
        "source": config.source.uri,
        "source_kind": planned.kind,
        "source_digest": planned.digest,
        **identity_values(config.rules),
        "short_side": 0 if config.resolution else config.short_side,
        "rows_per_part": config.rows_per_part,
    }
    fingerprint = {"height": config.resolution, "width": config.resolution} if config.resolution else {}
    everything = dataclasses.replace(config, output=join(config.output, ALL))
    spec = ImportSpec(config=everything, fingerprint=fingerprint, inputs=made_from)
    parted = {
        name: getattr(config, name) for name in ("held_out_share", "held_out_least", "near_distance", "near_duplicates")
    }
    job = ImportJob(
        config=config, table=TableJob(spec=spec, source=planned, actor=Passing), inputs={**spec.identity(), **parted}
    )
    _refuse_other(job)
    return job


def _refuse_other(job: ImportJob) -> None:
    """Refuse an output that holds other files, or finished tables of another import."""
    ours = {ALL, *SIDES, SUMMARY, DUPLICATES, QUARANTINE_NAME, "report.html"}
    if strange := sorted(set(list_names(job.config.output)) - ours):
        raise OutputError(
            f"{job.config.output!r} holds other files: {', '.join(strange[:5])}. Give another output, or remove them."
        )
    for side in SIDES:
        if manifest_exists(job.place(side)):
            there = {name: value for name, value in read_manifest(job.place(side)).inputs.items() if name != "side"}
            if changed := differences(there, json.loads(json.dumps(job.inputs))):
                raise OutputError(
                    f"{job.config.output!r} holds images of another import: {'; '.join(changed)}. Give another output, "
                    "or remove it."
                )


def import_images(job: ImportJob) -> dict[Side, Manifest]:
    """Write what is missing; needs a running Ray. Finished tables are not changed.

    Returns:
        The manifest of each side; without test if nothing is held out.

    Raises:
        ValueError: too many images are unusable, or the cluster is too small.
    """
    output, everything = job.config.output, join(job.config.output, ALL)
    if (done := _finished(job)) is not None:
        remove_tree(everything)
        logger.info("%s: complete with %d images, nothing to do", output, sum(m.num_rows for m in done.values()))
        return done
    table = make_table(job.table)
    config = job.config
    parting = part_rows(
        read_known(everything, table),
        near_distance=config.near_distance,
        held_out_share=config.held_out_share,
        held_out_least=config.held_out_least,
        drop=config.near_duplicates == "drop",
    )
    held_out, trained = (int(parting.chosen(side).sum()) for side in ("test", "train"))
    if held_out > trained:
        raise ImportImagesError(
            f"held_out_share={config.held_out_share:g} and held_out_least={config.held_out_least} take {held_out} of "
            f"{held_out + trained} images, more than are left to train on. Give more images, or hold out less."
        )
    write_bytes(join(output, DUPLICATES), "".join(f"{line}\n" for line in parting.alike_lines()).encode())
    write_bytes(join(output, QUARANTINE_NAME), read_bytes(join(everything, QUARANTINE_NAME)))
    summary = write_report(config, everything, table, parting)
    made: dict[Side, Manifest] = {
        side: _write_side(job, everything, table, parting, side) for side in SIDES if parting.chosen(side).any()
    }
    write_bytes(join(output, SUMMARY), json.dumps(summary, indent=1).encode())  # last: the import is complete
    remove_tree(everything)
    rows = ", ".join(f"{manifest.num_rows} in {side}/" for side, manifest in made.items())
    logger.info("%s: %d images read, %s; look at %s", output, table.counts["read"], rows, join(output, "report.html"))
    return made


def _finished(job: ImportJob) -> dict[Side, Manifest] | None:
    if SUMMARY not in list_names(job.config.output):
        return None
    return {side: read_manifest(job.place(side)) for side in SIDES if manifest_exists(job.place(side))}


def _write_side(job: ImportJob, everything: str, table: Manifest, parting: Parting, side: Side) -> Manifest:
    parts = side_parts(table, parting, side, job.config.rows_per_part)
    made, _ = generate_table(
        GeneratedTable(
            job=f"write {side}/",
            output=job.place(side),
            kind=table.kind,
            fingerprint=table.fingerprint,
            inputs={**job.inputs, "side": side},
            num_parts=len(parts),
            make_part=partial(write_side_part, parts, everything, job.place(side)),
            num_tasks=job.config.num_readers,
        )
    )
    return made
