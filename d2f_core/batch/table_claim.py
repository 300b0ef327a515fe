"""Whose output it is: a table job's identity is recorded where it begins; another job is refused with what differs."""

import json
from collections.abc import Mapping
from typing import Any

from d2f_core.batch.chunk_records import JOB_NAME, PROGRESS
from d2f_core.batch.output import OutputError
from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.data.size_tables import BY_SIZE
from d2f_core.identity import differences
from d2f_core.storage import join, list_names, read_bytes, write_bytes

SOURCE_DIGEST = "source_digest"
"""The input that says what the source holds; if it alone differs, a table that grows gets a further version."""


def claim_output(spec: TableSpec) -> None:
    """Record the job at its output, or check that the job begun there is this one.

    Raises:
        OutputError: another job began there (names the differences), or the output holds other files.
    """
    place = join(spec.config.output, PROGRESS, JOB_NAME)
    refuse_strange(spec.config.output)
    try:
        write_bytes(place, json.dumps(spec.identity(), indent=1, sort_keys=True).encode(), exclusive=True)
    except FileExistsError:
        refuse_other(spec, json.loads(read_bytes(place)), "is an unfinished table")


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
    if manifest.kind != (spec.KIND + BY_SIZE if spec.tables else spec.KIND):
        raise OutputError(f"{spec.config.output!r} holds a table of {manifest.kind}. Give another output.")
    refuse_other(spec, _identity(manifest), "is a complete table")


def source_has_changed(spec: TableSpec, manifest: Manifest) -> bool:
    """Whether the finished table is this job's but for what its source holds, and is of a kind that grows.

    Raises:
        OutputError: the table is another job's; names the differences.
    """
    there, now = _counted_values(spec, _identity(manifest)), _counted_values(spec, spec.identity())
    changed = {name for name in {*there, *now} if there.get(name) != now.get(name)}
    if spec.grows and manifest.kind == spec.KIND and changed == {SOURCE_DIGEST}:
        return True
    check_complete_table(spec, manifest)
    return False


def refuse_strange(output: str) -> None:
    """Raise OutputError if the output holds files of which no table job was begun."""
    if (names := list_names(output)) and PROGRESS not in names:
        raise OutputError(
            f"{output!r} is not empty: it holds {', '.join(names[:5])}. Give another output, or remove them."
        )


def refuse_other(spec: TableSpec, there: Mapping[str, Any], what: str) -> None:
    """Raise OutputError, with the differences, unless the identity at the output (`there`) is that of this job."""
    if changed := differences(_counted_values(spec, there), _counted_values(spec, spec.identity())):
        raise OutputError(
            f"{spec.config.output!r} {what} of another job: {'; '.join(changed)}. Give another output, or remove it."
        )


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.inputs, "fingerprint": manifest.fingerprint}


def _counted_values(spec: TableSpec, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and fingerprint in one mapping, without the spec's `FREE` inputs."""
    values = {**identity, **identity.get("fingerprint", {})}
    return {name: value for name, value in values.items() if name != "fingerprint" and name not in spec.FREE}
