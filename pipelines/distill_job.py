"""A checked distillation: its data, its identity, and the export of its last checkpoint."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from d2f_core import storage
from d2f_core.correspondence import pck
from d2f_core.correspondence.artifact import (
    MatcherDescription,
    describe_matcher,
    set_adapters,
    upload_matcher,
)
from d2f_core.correspondence.embed.config import teacher_of
from d2f_core.correspondence.evaluate.measure import by_viewpoint, measure, predict_by
from d2f_core.correspondence.evaluate.view_pairs import pairs_of_views, read_views
from d2f_core.correspondence.matcher import transformer_matcher
from d2f_core.correspondence.matching import Decoding
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import load_network, patch_size
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_plan import OrderConfig
from d2f_core.data.table_reader import RowReader
from d2f_core.identity import identity_hash, identity_values
from d2f_core.model.base import described_copy
from d2f_core.tracking import check_tracking, pin_model, resolve_model
from d2f_core.train.checkpoint import Checkpoint, candidates, list_checkpoints, read_tensors
from d2f_core.train.task import Evaluation, Task
from pipelines.distill_config import DistillConfig
from pipelines.distill_data import check_table, plan_of, task_of
from pipelines.training import TrainingJob

START_FIELDS = ("layers", "rank", "alpha", "first_block")


@dataclass(frozen=True, kw_only=True)
class DistillJob(TrainingJob):
    config: DistillConfig
    manifest: Manifest
    base_hash: str

    @property
    def reads(self) -> Mapping[str, str]:
        config = self.config
        return {
            "features": config.features,
            "matcher.student.base": config.matcher.student.base,
            "start": config.start,
            "clusters": config.clusters,
            "pairs.views": config.pairs.views,
        }

    @property
    def tags(self) -> Mapping[str, str]:
        base = self.config.matcher.student.base
        return {
            "d2f.base": base,
            "d2f.base_sha256": self.base_hash,
            "d2f.features_digest": self.manifest.digest,
            **self._pairs(),
        }

    def _teachers(self) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Each teacher's column, and what is known of its weights and settings."""
        return self.manifest.fingerprint["teachers"].items()

    def _pairs(self) -> dict[str, str]:
        """What the PCK of this run is measured on."""
        pairs = self.config.pairs
        if not pairs.views:
            return {}
        what = f"{pairs.views} {pairs.split}, {pairs.per_range} per range, seed {pairs.seed}"
        return {"d2f.pairs": what, "d2f.pairs_digest": read_manifest(pairs.views).digest}

    def export(self, last: Checkpoint) -> str:
        kind = "ema" if self.config.train.ema.decay else "weights"
        description = MatcherDescription(
            student=self.config.matcher.student,
            base_hash=self.base_hash,
            preparation=preparation(self.config, self.manifest),
            decoding=Decoding(),
            training={
                "step": last.manifest.step,
                "checkpoint": last.uri,
                "features": self.manifest.digest,
                "teachers": {teacher_of(column): facts for column, facts in self._teachers()},
                "distillation": asdict(self.config.matcher.distillation),
                "multi_view": asdict(self.config.matcher.multi_view),
            },
        )
        return upload_matcher(storage.join(self.config.output, "model"), read_tensors(last, kind), description)


def preparation(config: DistillConfig, manifest: Manifest) -> Preparation:
    """How images are prepared for the trained matcher: as in its table, at the size at which it is used."""
    size = config.matching_size or int(manifest.fingerprint["size"])
    return Preparation(size=size, normalisation=config.normalisation)


def build_task(config: DistillConfig, base_hash: str, start_hash: str, device: str) -> Task:
    """What a worker trains; called once on each.

    Args:
        base_hash: content hash of the student's base where the training started.
        start_hash: of the matcher that it starts with; empty: none.

    Raises:
        ValueError: this node has another base, or the start is of another student.
    """
    manifest = read_manifest(config.features)
    if (found := described_copy(config.matcher.student.base).hash()) != base_hash:
        raise ValueError(
            f"{config.matcher.student.base!r} has the hash {found} on this node, and {base_hash} where the training "
            "started: it was replaced, or is another directory here. Give a URI that all nodes share."
        )
    task = task_of(config, manifest, device)
    if config.start:
        if (found := _start_hash(config)) != start_hash:
            raise ValueError(
                f"start={config.start!r} has the hash {found} on this node, and {start_hash} where the training "
                "started: it was trained anew, or is another directory here. Give another output for this training."
            )
        set_adapters(task.module, config.start)
    evaluates = functools.partial(evaluate, config, manifest, task.module) if config.pairs.views else None
    return Task(module=task.module, to_batch=task.to_batch, loss_fn=task.loss, evaluate=evaluates)


def evaluate(config: DistillConfig, manifest: Manifest, module: nn.Module) -> Evaluation:
    """PCK on pairs of views whose things were not trained on."""
    pairs = pairs_of_views(
        read_views(config.pairs.views, config.pairs.split), per_range=config.pairs.per_range, seed=config.pairs.seed
    )
    training = module.training
    module.eval()
    try:
        matcher = transformer_matcher(config.name, module, preparation(config, manifest))
        measured = measure(predict_by(matcher), pairs)
    finally:
        module.train(training)
    ranges = list(by_viewpoint(measured))
    draws = torch.stack([torch.ones(len(measured.pair_ids), dtype=torch.bool), *(within for _, within in ranges)])
    found = pck.pck(measured.matches, pck.PROTOCOLS["original"].scoring, (0.1, 0.05), draws=draws)
    names = ["", *(f"_{name}" for name, _ in ranges)]
    metrics = {f"pck@0.1{name}": float(value) for name, value in zip(names, found.point[:, 0], strict=True)}
    metrics["pck@0.05"] = float(found.point[0, 1])
    return Evaluation(metrics={name: value for name, value in metrics.items() if value == value})


@dataclass(frozen=True, kw_only=True)
class CheckedDistill:
    """A distillation that was found to work, as far as configs and the headers of weights tell."""

    config: DistillConfig
    manifest: Manifest
    plan: StreamPlan
    order: OrderConfig
    base_hash: str
    start_hash: str
    """Of the matcher to start with; empty: none."""

    @property
    def identity(self) -> str:
        """Hash of everything that a checkpoint and this run must have in common."""
        config = self.config
        matcher = identity_values(config.matcher)
        matcher["student"] = {name: value for name, value in matcher["student"].items() if name != "base"}
        fixed = {
            "matcher": matcher, "base": self.base_hash, "features": self.manifest.digest,
            "normalisation": config.normalisation, "start": self.start_hash,
        }  # fmt: skip
        return identity_hash({**fixed, **self.order.identity()})

    def job(self) -> DistillJob:
        return DistillJob(
            config=self.config,
            build_task=functools.partial(build_task, self.config, self.base_hash, self.start_hash),
            plan=self.plan,
            identity=self.identity,
            manifest=self.manifest,
            base_hash=self.base_hash,
        )


def check_distill(config: DistillConfig) -> CheckedDistill:
    """Refuse what cannot work, before anything is started; no weights are loaded.

    A `start` given by an alias is pinned to the version that it names now.

    Raises:
        ValueError: unusable storage, table, student or start; one line each.
    """
    storage.check_reachable(config.features)
    storage.check_reachable(config.clusters)
    storage.check_reachable(config.matcher.student.base)
    storage.check_reachable(config.output, write=True)
    manifest = read_manifest(config.features)
    patch = patch_size(load_network(config.matcher.student, "meta"))
    check_table(config, manifest, patch)
    if (used := preparation(config, manifest).size) % patch:
        raise ValueError(
            f"matching_size={used} is no multiple of the student's patch {patch}. Use {used // patch * patch}."
        )
    base_hash = described_copy(config.matcher.student.base).hash()
    config = replace(config, start=pin_model(config.start))
    start_hash = _check_start(config, base_hash) if config.start else ""
    _check_pairs(config)
    plan, order = plan_of(config, manifest)
    check_tracking()
    checked = CheckedDistill(
        config=config, manifest=manifest, plan=plan, order=order, base_hash=base_hash, start_hash=start_hash
    )
    if list_checkpoints(config.output):
        candidates(config.output, checked.identity)  # raises if the output holds another training
    return checked


def _check_start(config: DistillConfig, base_hash: str) -> str:
    """The hash of the matcher to start with; raises ValueError when it is another student's."""
    storage.check_reachable(config.start)
    there, asked = describe_matcher(config.start), config.matcher.student
    for name, value, other in (
        *((f"student.{name}", getattr(there.student, name), getattr(asked, name)) for name in START_FIELDS),
        ("base", there.base_hash[:12], base_hash[:12]),
        ("normalisation", there.preparation.normalisation, config.normalisation),
    ):
        if value != other:
            raise ValueError(f"start={config.start!r} has {name}={value}, this training {other}. Use the same student.")
    return _start_hash(config)


def _start_hash(config: DistillConfig) -> str:
    return described_copy(resolve_model(config.start)).hash()


def _check_pairs(config: DistillConfig) -> None:
    """Raise ValueError when a training could not be evaluated on its pairs of views."""
    views = config.pairs.views
    if not views:
        return
    storage.check_reachable(views)
    manifest = read_manifest(views)
    if manifest.kind != "views":
        raise ValueError(f"pairs.views={views!r} holds {manifest.kind}. Give a table that make_views wrote.")
    splits = RowReader(views, manifest, ("split",)).read(np.arange(manifest.num_rows)).column("split").to_pylist()
    if config.pairs.split not in splits:
        raise ValueError(f"pairs.split={config.pairs.split!r} is not in {views!r}. Use one of {sorted(set(splits))}.")
