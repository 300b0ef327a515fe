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
from d2f_core.batch.table_job import TableJob, check_output, make_table
from d2f_core.data.datasets.generated_table import PROGRESS as GENERATING
from d2f_core.data.datasets.generated_table import GeneratedTable, generate_table
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.data.quarantine import QUARANTINE_NAME
from d2f_core.data.sources.config import lies_in
from d2f_core.data.sources.images import plan_images
from d2f_core.identity import differences, identity_values
from d2f_core.import_images.config import ImportImagesConfig, ImportImagesError
from d2f_core.import_images.parting import SIDES, Parting, Side, part_rows, read_known, side_parts, write_side_part
from d2f_core.import_images.report import write_report
from d2f_core.import_images.spec import ImportSpec, Passing
from d2f_core.model.caption_rules import CaptionRules
from d2f_core.retry import one_line
from d2f_core.storage import check_reachable, exists, join, list_names, read_bytes, remove_tree, write_bytes

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
    """What both tables are made from, as JSON values."""

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
    if lies_in(config.output, config.source.uri):
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
    parted = {name: getattr(config, name) for name in ("held_out_share", "near_distance", "near_duplicates")}
    _check_base(config.base, config.captions)
    job = ImportJob(
        config=config, table=TableJob(spec=spec, source=planned, actor=Passing), inputs={**spec.identity(), **parted}
    )
    _refuse_other(job)
    check_output(job.table)
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
            there = read_manifest(job.place(side)).inputs
            there = {name: value for name, value in there.items() if name not in ("side", "parting")}
            if changed := differences(there, job.inputs):
                raise OutputError(
                    f"{job.config.output!r} holds images of another import: {'; '.join(changed)}. Give another output, "
                    "or remove it."
                )
    done, least = _finished(job), job.config.held_out_least
    if done is not None and (held_out := done["test"].num_rows if "test" in done else 0) < least:
        raise OutputError(
            f"{job.config.output!r} holds a finished import with {held_out} images held out, and "
            f"held_out_least={least} asks for more. Give another output, or remove it."
        )


def _check_base(uri: str, captions: CaptionRules) -> None:
    """Refuse a base whose tokenizer cannot count the captions' tokens, before all images are read."""
    if uri:
        from d2f_core.model.base import describe_base
        from d2f_core.model.text_encoder import describe_text_encoder

        check_reachable(uri)
        try:
            describe_text_encoder(describe_base(uri).read_captions(captions))
        except OSError as error:  # transformers, of a tokenizer without its files
            raise ImportImagesError(f"base={uri!r} has no tokenizer that can be read ({one_line(error)}).") from None


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
    _check_sides(config, parting)
    write_bytes(join(output, DUPLICATES), "".join(f"{line}\n" for line in parting.alike_lines()).encode())
    write_bytes(join(output, QUARANTINE_NAME), read_bytes(join(everything, QUARANTINE_NAME)))
    summary = write_report(config, everything, table, parting)
    made: dict[Side, Manifest] = {
        side: _write_side(job, everything, table, parting, side) for side in SIDES if parting.chosen(side).any()
    }
    summary |= {"base": config.base, "tables": {side: manifest.digest for side, manifest in made.items()}}
    write_bytes(join(output, SUMMARY), json.dumps(summary, indent=1).encode())  # last: the import is complete
    remove_tree(everything)
    rows = ", ".join(f"{manifest.num_rows} in {side}/" for side, manifest in made.items())
    logger.info("%s: %d images read, %s; look at %s", output, table.counts["read"], rows, join(output, "report.html"))
    return made


def _check_sides(config: ImportImagesConfig, parting: Parting) -> None:
    held_out, trained = (int(parting.chosen(side).sum()) for side in ("test", "train"))
    if held_out > trained or not trained:
        largest = max(map(len, parting.alike), default=1)
        raise ImportImagesError(
            f"held_out_share={config.held_out_share:g} and held_out_least={config.held_out_least} take {held_out} of "
            f"{held_out + trained} images, more than are left to train on; up to {largest} of them look alike and stay "
            "together. Give more images, hold out less (held_out_share=0: none), or lower near_distance."
        )


def _finished(job: ImportJob) -> dict[Side, Manifest] | None:
    """The tables of a finished import; None if it is not finished, or its tables are gone."""
    if SUMMARY not in list_names(job.config.output):
        return None
    summary = json.loads(read_bytes(join(job.config.output, SUMMARY)))
    done: dict[Side, Manifest] = {
        side: read_manifest(job.place(side)) for side in SIDES if manifest_exists(job.place(side))
    }
    if summary["tables"] != {side: manifest.digest for side, manifest in done.items()}:
        return None
    if job.config.base not in ("", summary["base"]):
        logger.warning("the report is of an import with base=%r; for another remove %s", summary["base"], SUMMARY)
    return done


def _write_side(job: ImportJob, everything: str, table: Manifest, parting: Parting, side: Side) -> Manifest:
    parts = side_parts(table, parting, side, job.config.rows_per_part)
    inputs = {**job.inputs, "side": side, "parting": parting.digest}
    _remove_other(job.place(side), inputs)
    made, _ = generate_table(
        GeneratedTable(
            job=f"write {side}/",
            output=job.place(side),
            kind=table.kind,
            fingerprint=table.fingerprint,
            inputs=inputs,
            num_parts=len(parts),
            make_part=partial(write_side_part, parts, everything, job.place(side)),
            num_tasks=job.config.num_readers,
        )
    )
    return made


def _remove_other(place: str, inputs: Mapping[str, Any]) -> None:
    """Remove what an unfinished import with another parting left of a side."""
    if manifest_exists(place):
        there = read_manifest(place).inputs
    elif exists(begun := join(place, GENERATING, "job.json")):
        there = json.loads(read_bytes(begun))
    else:
        return
    if there != inputs:
        remove_tree(place)
