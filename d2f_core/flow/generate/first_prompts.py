"""The index rows of a generation's first prompts, read without the rest of its index.

An index is written chunk by chunk: the rows of a chunk stand together, all its prompts at the first number of steps,
then at the next. So the first prompts are complete after the first parts, however many prompts there are.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from d2f_core.batch.output import stream_index
from d2f_core.data.manifest import read_manifest


def first_prompts(output: str, count: int) -> dict[str, str]:
    """The first prompts of a finished generation by sample id, in their order; fewer if there are fewer."""
    found: dict[str, str] = {}
    for part in stream_index(output, ("sample_id", "prompt")):
        for name in part["sample_id"].unique():
            if len(found) == count:
                return found
            if name.as_py() not in found:
                found[name.as_py()] = part["prompt"][part["sample_id"].index(name).as_py()].as_py()
    return found


def rows_of(output: str, sample_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """The index rows of these samples in the order of the index, of which no more is read than until all are complete.

    Args:
        columns: `sample_id` and `steps` are read in any case.
    """
    rows = len(sample_ids) * len(read_manifest(output).fingerprint["steps"])
    key, wanted, found = ["sample_id", "steps"], pa.array(sample_ids, pa.string()), []
    for part in stream_index(output, list(dict.fromkeys([*key, *columns]))):
        found.append(part.filter(pc.field("sample_id").isin(wanted)))
        there = pa.concat_tables(found)
        if there.select(key).group_by(key).aggregate([]).num_rows == rows:
            return there
    return pa.concat_tables(found)
