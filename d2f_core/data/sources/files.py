"""The files at a source's URI, which may be a pattern, and the part of a data set that each belongs to."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from d2f_core.data.manifest import MANIFEST_NAME
from d2f_core.data.sources.config import SPLITS
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, COMPANION_SUFFIXES, PACKED_SUFFIXES, SourceError
from d2f_core.storage import exists, filesystem, is_s3, retried

Listing = Mapping[str, Mapping[str, Any]]
"""The storage's properties of the files by URI."""

RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_PIECES = 100_000
"""Most places that the braces of one pattern may stand for."""
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of splits, and which of `SPLITS` each is."""
HOLD_IMAGES = (*ALL_IMAGE_SUFFIXES, *COMPANION_SUFFIXES, *PACKED_SUFFIXES, ".tar", ".parquet")
SHARD_OF_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?=[-_.\d])")


def list_files(uri: str) -> dict[str, dict[str, Any]]:
    """Files under a URI, or the file that the URI names, or those of a pattern, with their properties by URI; hidden
    ones (".git", "._a.png") are left out.

    Raises:
        SourceError: a folder cannot be read, or links lead in a circle; a part of a pattern names nothing.
    """
    if not is_pattern(uri):
        return _files_at(uri)
    found: dict[str, dict[str, Any]] = {}
    for piece in expand(uri):
        files = _matching(piece) if "*" in piece else _files_at(piece)
        if not files:
            raise SourceError(f"{piece!r}, of {uri!r}, names no files. Correct the pattern, or bring them there.")
        parts = {file.rpartition("/")[0] for file in files if "/part-" in file and file.endswith(".parquet")}
        if table := next((folder for folder in sorted(parts) if f"{folder}/{MANIFEST_NAME}" in files), None):
            raise SourceError(
                f"{uri!r} is a pattern, and {table!r} is a table of this project, which is read alone by its manifest. "
                "Give the table's own URI."
            )
        found.update(files)
    return found


def is_pattern(uri: str) -> bool:
    """Whether a URI holds a list, a range or `*`, and is not the very name of something."""
    return bool(re.search(r"[*,]|\{[^{}]*(,|\.\.)[^{}]*\}", uri)) and not exists(uri)


def expand(uri: str) -> list[str]:
    """The places that commas, `{a,b}` and `{000..099}` stand for, in order.

    Raises:
        SourceError: they are too many.
    """
    pieces = list(itertools.islice(_alternatives(uri), MOST_PIECES + 1))
    if len(pieces) > MOST_PIECES:
        raise SourceError(f"{uri!r} stands for more than {MOST_PIECES} places. Use *, or give a folder.")
    return list(dict.fromkeys(piece for piece in pieces if piece))


def _alternatives(text: str) -> Iterator[str]:
    """Every text that the commas and braces of one stand for."""
    for part in _split_at_commas(text):
        brace = re.search(r"\{([^{}]*)\}", part)
        inner = brace[1] if brace else ""
        if not brace or not ("," in inner or RANGE.fullmatch(inner)):
            yield part.strip()
            continue
        choices = inner.split(",")
        if numbers := RANGE.fullmatch(inner):
            width = len(numbers[1])
            choices = (f"{number:0{width}d}" for number in range(int(numbers[1]), int(numbers[2]) + 1))
        for choice in choices:
            yield from _alternatives(part[: brace.start()] + choice + part[brace.end() :])


def _split_at_commas(text: str) -> list[str]:
    """The parts between the commas that stand in no braces."""
    return re.split(r",(?![^{}]*\})", text)


def _matching(pattern: str) -> dict[str, dict[str, Any]]:
    """Files that a pattern with `*` names, and those in folders that it names; `*` stands for no slash."""
    place = ("s3://" if is_s3(pattern) else "") + filesystem(pattern)[1]
    known = place[: place.index("*")].rpartition("/")[0]
    rule = re.compile("[^/]*".join(map(re.escape, place.split("*"))) + "(/.*)?")
    return {uri: entry for uri, entry in _files_at(known).items() if rule.fullmatch(uri)}


def _files_at(uri: str) -> dict[str, dict[str, Any]]:
    fs, path = filesystem(uri)
    if is_s3(uri):
        found, prefix = retried(f"list {uri}", lambda: fs.find(path, detail=True)), "s3://"
    else:
        found, prefix = dict(sorted(_local_files(fs, path, ()))), ""
    files = {}
    for name, entry in found.items():
        below = name.removeprefix(path).lstrip("/").split("/")
        if not any(part.startswith(".") for part in below):
            files[prefix + name] = entry
    return files


def _local_files(fs: Any, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files below a folder, by path, through links to folders too."""
    here = os.path.realpath(folder)
    if here in above:
        raise SourceError(f"{folder!r} is a link to a folder that it lies in. Remove the link.")
    try:
        entries = fs.ls(folder, detail=True)
    except FileNotFoundError:
        if above:
            raise
        return
    except OSError as error:
        raise SourceError(f"{folder!r} cannot be read ({error.strerror}). Allow it, or move the folder.") from None
    for entry in entries:
        name = entry["name"]
        hidden = os.path.basename(name).startswith(".") and name != folder
        is_folder = entry["type"] == "directory" or (entry.get("islink") and os.path.isdir(name))
        if is_folder and name != folder and not hidden:
            yield from _local_files(fs, name, (*above, here))
        elif not is_folder:
            yield name, entry


def split_of(path: str, *, by_file: bool) -> str | None:
    """The split, one of `SPLITS`, that a file belongs to by the name of a folder, or by its own; None: by neither.

    Args:
        path: relative to the source.
        by_file: the file's own name counts, as those of shards do: `train-00000.parquet`.
    """
    *folders, name = path.lower().split("/")
    for folder in folders:
        if folder in SPLIT_NAMES:
            return SPLIT_NAMES[folder]
    shard = SHARD_OF_SPLIT.match(name) if by_file else None
    return SPLIT_NAMES[shard[1]] if shard else None


def _root(uri: str, listing: Listing) -> str:
    """What the names of all files begin with."""
    place = ("s3://" if is_s3(uri) else "") + filesystem(uri)[1]
    if all(file == place or file.startswith(f"{place}/") for file in listing):
        return place
    # Of a pattern. Not `commonpath`, which makes one slash of the two in s3://.
    first, last = min(listing), max(listing)
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    return first[:same].rpartition("/")[0]


def of_split(uri: str, listing: Listing, asked: str | None, *, by_file: bool) -> Listing:
    """The files of a split; without one, all.

    Raises:
        SourceError: none is asked for, and there are several; or the one that is asked for is not there.
    """
    root = _root(uri, listing)
    splits = {file: split_of(file.removeprefix(root).lstrip("/"), by_file=by_file) for file in listing}
    there = [split for split in SPLITS if split in splits.values()]
    if asked in SPLITS:
        if asked not in there:
            raise SourceError(
                f"{uri!r} has nothing that is named as split {asked!r} (found: {', '.join(there) or 'no splits'}). "
                "Correct --source.split, or leave it out."
            )
        # Caption tables outside every split may tell of it.
        shared = lambda file: splits[file] is None and not file.lower().endswith(HOLD_IMAGES)  # noqa: E731
        return {file: entry for file, entry in listing.items() if splits[file] == asked or shared(file)}
    if len(there) > 1 and asked is None:
        raise SourceError(
            f"{uri!r} holds the splits {', '.join(there)}, which would be read together. Choose one: --source.split "
            f"{there[0]}, or --source.split all for a mixture."
        )
    return listing
