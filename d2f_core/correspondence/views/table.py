"""The table of rendered views, written by a Ray Data job; each part holds the views of a few objects."""

from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from d2f_core.correspondence.views.config import MakeViewsConfig
from d2f_core.correspondence.views.rows import VIEW_SCHEMA, make_rows
from d2f_core.data.datasets.generated_table import GeneratedTable, generate_table, package_versions, part_name
from d2f_core.data.manifest import Manifest, TableFile, rows_per_group, write_part

KIND = "views"
PACKAGES = ("embreex", "numpy", "pillow")


def view_inputs(config: MakeViewsConfig) -> dict[str, Any]:
    """Everything that determines the table's content: the manifest's `inputs`.

    Raises:
        ValueError: embreex is not installed.
    """
    packages = package_versions(PACKAGES, "Views", extra="correspondence")
    names = ("size", "train_meshes", "val_meshes", "test_meshes", "views_per_mesh", "seed", "meshes_per_part")
    values = {name: getattr(config, name) for name in names}
    return {**values, "categories": list(config.categories), "packages": packages}


def make_views(config: MakeViewsConfig) -> tuple[Manifest, bool]:
    """Write the missing parts of the table of views, then its manifest; needs a running Ray.

    Returns:
        The manifest, and whether anything was written (False: the table was complete).

    Raises:
        ManifestError: the output holds another table, or files that are no table.
        ValueError: embreex is not installed.
    """
    table = GeneratedTable(
        job="make_views",
        output=config.output,
        kind=KIND,
        fingerprint={"height": config.size, "width": config.size},
        inputs=view_inputs(config),
        num_parts=config.num_parts,
        make_part=partial(make_part, config),
        num_tasks=config.num_tasks,
    )
    return generate_table(table)


def make_part(config: MakeViewsConfig, number: int) -> TableFile:
    """Render and write the views of one part's objects."""
    first = number * config.meshes_per_part
    meshes = islice(config.meshes(), first, first + config.meshes_per_part)
    table = pa.Table.from_pylist([row for mesh in meshes for row in make_rows(config, *mesh)], VIEW_SCHEMA)
    group = rows_per_group(table.nbytes // table.num_rows)
    return write_part(config.output, part_name(number), table, row_group_rows=group)
