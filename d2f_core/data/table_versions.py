"""The versions of a table, whose source grew or lost samples after the table had been finished.

    URI/manifest.json                     version 1
    URI/_versions/manifest-2.json         version 2: the files of version 1, others for what was added, and others in
                                          place of those that lost rows
    URI/_versions/quarantine-2.parquet    its ledger

Each manifest is written once, and no file that one of them lists is ever written again: whoever reads a version finds
what was there when it was made. Readers take the newest version unless they name another one.
"""

import re

from d2f_core.storage import join, list_names

MANIFEST_NAME = "manifest.json"
VERSIONS = "_versions"
LATER = re.compile(r"manifest-([1-9][0-9]*)\.json")


def newest_version(uri: str) -> int:
    """Number of the newest version of the table at `uri`; 1 also where there is no table."""
    found = (LATER.fullmatch(name) for name in list_names(join(uri, VERSIONS)))
    return max((int(match[1]) for match in found if match), default=1)


def versioned(name: str, version: int) -> str:
    """Path, relative to a table, of the file `name.suffix` that belongs to one of its versions."""
    stem, _, suffix = name.rpartition(".")
    return name if version == 1 else f"{VERSIONS}/{stem}-{version}.{suffix}"
