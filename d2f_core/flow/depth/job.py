"""Batch inference: from images to depth maps and an index table.

    OUTPUT/plan.json                                  what decides the maps; a second job with another plan is refused
    OUTPUT/depth/SSSSSS/{sample_id}-{steps}.npy       float32 [height, width]: 0 near, 1 far
    OUTPUT/depth/SSSSSS/{sample_id}-{steps}.png       the same in 16 bits
    OUTPUT/depth/SSSSSS/..-uncertainty.npy, ..-preview.png
    OUTPUT/index/part-*.parquet                       one row per image and number of steps: every setting, or why not
    OUTPUT/manifest.json                              written last

SSSSSS is the number of the source's shard. A shard is done if its index part exists; all others are made again.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from d2f_core.batch.actor_pool import map_items
from d2f_core.batch.output import IndexedOutput, IndexPart, table_file
from d2f_core.batch.run_log import RunLog
from d2f_core.data.manifest import Manifest
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.flow.depth.actor import DepthActor, work_item
from d2f_core.flow.depth.config import PredictDepthConfig
from d2f_core.flow.depth.plan import DepthPlan, make_depth_plan
from d2f_core.flow.depth.predictor import check_depth_model
from d2f_core.model.artifact import describe_model
from d2f_core.progress import Progress
from d2f_core.storage import check_reachable
from d2f_core.tracking import check_tracking, pin_model, resolve_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DepthJob:
    """A checked job that is ready to run."""

    config: PredictDepthConfig
    source: SourcePlan
    plan: DepthPlan


def check_predict_depth(config: PredictDepthConfig) -> DepthJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, source, model or sampler settings; one line each.
    """
    config.check_complete()
    check_reachable(config.source.uri)
    check_reachable(config.model)
    check_reachable(config.output, write=True)
    if config.model.startswith("models:/"):
        check_tracking()
    pinned = pin_model(config.model)
    model = describe_model(resolve_model(pinned))
    check_depth_model(model, config.model)
    source = plan_images(config.source, rows_per_shard=config.rows_per_part, captions=False)
    return DepthJob(config=config, source=source, plan=make_depth_plan(config, source, model, pinned))


def predict_depth(job: DepthJob) -> Manifest:
    """Make all missing maps; needs a running Ray. A finished output is not changed.

    Raises:
        ValueError: the output belongs to another plan, or the cluster is too small.
    """
    config, plan = job.config, job.plan
    output = IndexedOutput(config.output, plan.identity(), plan.num_shards)
    if output.manifest:
        logger.info("%s: all %d maps are there, nothing to do", config.output, output.manifest.num_rows)
        return output.manifest
    progress = Progress("predict_depth", plan.num_shards, "parts", done=len(output.parts))
    tags = {"d2f.model": plan.model_uri, "d2f.source": config.source.uri}
    with RunLog(config.experiment, config.output, config, plan, tags) as log:
        for result in _run(job, output.missing):
            output.add(result["shard"], IndexPart(table_file(result["part"]), result["failed"], {}))
            progress.advance(1)
        maps, failed = output.rows - output.failed, output.failed
        counts = {"images": output.rows // len(plan.steps), "maps": maps, "failed": failed}
        manifest = output.finish({"source": config.source.uri, "model": plan.model_uri}, counts)
        logger.info("%s: %d maps, %d failed", config.output, maps, failed)
        log.log(0, {name: float(count) for name, count in counts.items()})
    return manifest


def _run(job: DepthJob, shards: list[int]) -> Iterator[dict[str, Any]]:
    """One result per shard, in order of completion."""
    config = job.config
    items = [work_item(number, job.source.shards[number]) for number in shards]
    arguments = job.plan, config.output, config.cpus_per_actor
    return map_items(items, DepthActor, arguments, config, node_wait_seconds=config.node_wait_seconds)
