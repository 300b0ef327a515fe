"""Features of images by row, read in row groups, of which as many as fit into a limit are kept in memory."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import Manifest
from d2f_core.data.table_reader import DamagedDataError, RowRange, TableReader

READ_THREADS = 8

Image = dict[str, np.ndarray]
"""The columns of a row."""


class FeatureReader:
    """Rows that many pairs ask for; for one caller at a time."""

    def __init__(self, uri: str, manifest: Manifest, columns: Sequence[str], limit: float) -> None:
        """Open the table.

        Args:
            limit: bytes of row groups that are kept between calls, those used last.
        """
        self._reader, self._limit = TableReader(uri, manifest, columns), limit
        self._kept: OrderedDict[int, RowRange] = OrderedDict()
        self._pool = ThreadPoolExecutor(READ_THREADS)

    def read(self, rows: np.ndarray) -> dict[int, Image]:
        """The images of some rows.

        Raises:
            DamagedDataError: one of them cannot be used.
        """
        numbers = self._reader.groups_of(rows).tolist()
        missing = list(dict.fromkeys(number for number in numbers if number not in self._kept))
        self._kept.update(zip(missing, self._pool.map(self._fetch, missing), strict=True))
        found = {row: self._image(row, number) for row, number in zip(rows.tolist(), numbers, strict=True)}
        while sum(group.table.nbytes for group in self._kept.values()) > self._limit:
            self._kept.popitem(last=False)
        return found

    def _fetch(self, number: int) -> RowRange:
        (group,) = self._reader.row_groups(number, number)
        return self._reader.read(group.first, group.end)

    def _image(self, row: int, number: int) -> Image:
        self._kept.move_to_end(number)
        group = self._kept[number]
        if row in group.reasons:
            raise DamagedDataError(f"row {row}: {group.reasons[row]}. Write the table again.")
        place = int(group.places[row - group.first])
        return {name: values[0] for name, values in table_to_arrays(group.table.slice(place, 1)).items()}
