"""Tables of several row shapes, such as image sizes, below one URI.

    URI/NAME/part-*.parquet, manifest.json   a table for each shape, complete in itself
    URI/manifest.json                        written last: all their files, table after table, with `buckets` naming
                                             the tables and their numbers of rows; its kind ends in `_by_size`

The tables' kind and fingerprint follow from that manifest, so it alone is read to plan a training.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from d2f_core.data.manifest import Manifest, TableFile
from d2f_core.data.sample_order import SampleOrder
from d2f_core.storage import join

BY_SIZE = "_by_size"


def is_by_size(manifest: Manifest) -> bool:
    """Whether the manifest is that of several tables."""
    return manifest.kind.endswith(BY_SIZE)


def kind_of_rows(manifest: Manifest) -> str:
    """Kind of the rows, whether of one table or of several."""
    return manifest.kind.removesuffix(BY_SIZE)


def join_tables(tables: Sequence[tuple[str, Manifest]], manifest: Manifest) -> Manifest:
    """The manifest of several tables, each with its name; `manifest` gives all but kind, files and buckets."""
    files = tuple(replace(file, path=join(name, file.path)) for name, table in tables for file in table.files)
    buckets = tuple((name, table.num_rows) for name, table in tables)
    return replace(manifest, kind=tables[0][1].kind + BY_SIZE, files=files, buckets=buckets)


def tables_of(uri: str, manifest: Manifest) -> list[tuple[str, Manifest]]:
    """URI and manifest of each table of one shape: the table itself, or those below it."""
    if not is_by_size(manifest):
        return [(uri, manifest)]
    files: dict[str, list[TableFile]] = {name: [] for name, _ in manifest.buckets}
    for file in manifest.files:
        name, _, path = file.path.rpartition("/")
        files[name].append(replace(file, path=path))
    its = {"kind": kind_of_rows(manifest), "fingerprint": manifest.fingerprint}
    return [(join(uri, name), Manifest(files=tuple(own), **its)) for name, own in files.items()]


def shared_holdout(rows: Sequence[int], holdout_rows: int) -> list[int]:
    """How many of the held-out rows each of several tables gives: in proportion to its rows, and less than it has.

    Raises:
        ValueError: they are not fewer than all rows together, without one of each table.
    """
    total, most = sum(rows), sum(rows) - len(rows)
    if holdout_rows > most:
        raise ValueError(
            f"holdout_rows={holdout_rows} of {total} rows in {len(rows)} tables leave not one of each to train on. "
            f"Lower it to {most} at most."
        )
    exact = [count * holdout_rows / total for count in rows]
    shares = [min(int(share), count - 1) for share, count in zip(exact, rows, strict=True)]
    while (left := holdout_rows - sum(shares)) > 0:
        open_ = [place for place, count in enumerate(rows) if shares[place] < count - 1]
        open_.sort(key=lambda place: (shares[place] - exact[place], place))
        for place in open_[:left]:
            shares[place] += 1
    return shares


def held_out_rows(manifest: Manifest, holdout_rows: int) -> np.ndarray:
    """Int64 row numbers that a training holds out, of one table or, in the joint manifest's order, of several."""
    if not is_by_size(manifest):
        return SampleOrder(num_rows=manifest.num_rows, holdout_rows=holdout_rows).holdout()
    counts = [rows for _, rows in manifest.buckets]
    firsts = np.cumsum([0, *counts[:-1]])
    shares = shared_holdout(counts, holdout_rows)
    orders = [SampleOrder(num_rows=rows, holdout_rows=held) for rows, held in zip(counts, shares, strict=True)]
    return np.concatenate([first + order.holdout() for first, order in zip(firsts, orders, strict=True)])
