"""Small JSON files of a checkpoint that state their own digest, and what is wrong with a checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from d2f_core import storage
from d2f_core.identity import canonical_json
from d2f_core.s3_calls import ChecksumError, fetched_whole

FORMAT_VERSION = 2
"""Of a checkpoint's files; this release reads no other."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written, with the reason and the fix."""


class UnfinishedSaveError(CheckpointError):
    """A save was not completed, because another worker ended or the storage was not reachable."""


class DamagedError(CheckpointError):
    """Other bytes were read than were written."""


class OtherFormatError(CheckpointError):
    """An undamaged checkpoint in the format of another release."""


def damaged(place: str, reason: str) -> DamagedError:
    return DamagedError(
        f"{place} {reason}: the checkpoint was damaged. Delete its directory; the run then resumes from the one before."
    )


def seal(fields: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `fields`, with their `digest`."""
    digest = hashlib.sha256(canonical_json(fields)).hexdigest()
    return json.dumps({**fields, "digest": digest}, indent=1, sort_keys=True, ensure_ascii=False).encode()


def read_sealed(place: str, data: bytes | None = None) -> dict[str, Any]:
    """The fields that `seal` was given, from the file at the URI `place`; `data` was read there already.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: a byte differs from what was written, also when it was read again.
        OtherFormatError: a manifest of format 1, which had no digest.
    """
    given = [] if data is None else [data]

    def fetch() -> dict[str, Any]:
        return _unseal(place, given.pop() if given else storage.read_bytes(place, small=True))

    try:
        return fetched_whole(place, fetch, DamagedError)
    except ChecksumError:
        raise damaged(place, "comes with a wrong checksum, twice") from None


def _unseal(place: str, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
        if fields.get("format_version") == 1 and "digest" not in fields:
            raise other_format(place, 1)
        digest = fields.pop("digest")
        whole = seal(fields) == data  # also detects changes without meaning in JSON, such as a trailing space
    except OtherFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(place, f"is not what was written ({type(error).__name__}: {error})") from None
    if not whole:
        raise damaged(place, f"does not have the digest {str(digest)[:12]} that it states")
    return fields


def other_format(place: str, version: object) -> OtherFormatError:
    return OtherFormatError(
        f"{place} has format_version={version!r}; this release reads {FORMAT_VERSION}. "
        "Resume with the release that wrote it, or choose another output."
    )
