"""One frozen dataclass per training job; the other jobs' configs are beside their owners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from d2f_core.identity import identity_hash, identity_values, since
from d2f_core.model.config import AutoencoderLossConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.train.config import TrainConfig

if TYPE_CHECKING:
    from d2f_core.data.manifest import Manifest
    from d2f_core.data.stream_plan import StreamPlan
    from d2f_core.data.table_plan import OrderConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    model: ModelConfig
    latents: str
    """Latent table to train on, or the output of an encoding by `--buckets`, which holds one per image size."""
    more_latents: tuple[str, ...] = ()
    """Further tables, each with another image size; every batch comes from a single table."""
    latents_versions: tuple[int, ...] = since((), before=())
    """Version of each table, that of `latents` first; empty: the newest, and of a training that goes on those that it
    began with."""
    output: str
    """Where checkpoints and the resolved config are written; the same output resumes the training."""
    holdout_rows: int = 32
    """Rows of each table that are kept for validation; of all sizes together where `latents` holds several."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Default sampling settings of the trained model, stored with it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    experiment: str = "diff2flow"
    """MLflow experiment."""
    name: str = "finetune"
    """MLflow run name."""

    def __post_init__(self) -> None:
        if len(self.latents_versions) not in (0, len(self.tables)) or min(self.latents_versions, default=1) < 1:
            raise ValueError(
                f"latents_versions={self.latents_versions} must be a number from 1 on for each of the "
                f"{len(self.tables)} tables, or be left out for the newest."
            )

    @property
    def tables(self) -> tuple[str, ...]:
        """All tables to train on."""
        return self.latents, *self.more_latents

    def plan(self, manifests: "Sequence[Manifest]", columns: tuple[str, ...]) -> "StreamPlan":
        """Plan the order of the training rows and the held-out rows."""
        return _plan(self.tables, manifests, columns, self.holdout_rows, self.train)

    def identity(self, base_hash: str, manifests: "Sequence[Manifest]") -> str:
        """Hash of everything that a checkpoint and this run must have in common."""
        model = {name: value for name, value in identity_values(self.model).items() if name != "base"}
        # Runs from before these fields existed keep their identity.
        if self.model.task == "text_to_image":
            del model["task"]
        if not self.model.shift_by_resolution:
            del model["shift_by_resolution"]
        latents = [manifest.digest for manifest in manifests]
        fixed = {"model": model, "base": base_hash, "latents": latents, "holdout_rows": self.holdout_rows}
        return _digest(fixed, self.train)


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig:
    vae_config: str = ""
    """Directory with the config.json of an AutoencoderKL, to train from new random weights; the result is
    `OUTPUT/vae/`."""
    base: str = ""
    """Alternative to `vae_config`: a base model whose decoder is trained on the table's pictures. Its encoder is
    frozen, so its latents and UNet stay valid; the result is `OUTPUT/base/`, the base model with the new decoder."""
    images: str
    """Image table to train on, or depth table (its images, and its depth maps as pictures); all pictures have one
    size."""
    output: str
    """Where checkpoints, the resolved config and finally the result are written."""
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    holdout_rows: int = 32
    train: TrainConfig = field(default_factory=TrainConfig)
    experiment: str = "diff2flow"
    name: str = "autoencoder"

    def __post_init__(self) -> None:
        if bool(self.vae_config) == bool(self.base):
            raise ValueError(
                f"vae_config={self.vae_config!r} and base={self.base!r}: give one of them, the config of a new "
                "autoencoder, or the base model whose decoder is to be trained."
            )

    def plan(self, manifest: "Manifest", columns: tuple[str, ...]) -> "StreamPlan":
        """Plan the order of the training rows and the held-out rows."""
        return _plan((self.images,), (manifest,), columns, self.holdout_rows, self.train)

    def identity(self, begins_with: Mapping[str, Any], table: "Manifest") -> str:
        """Hash of everything that a checkpoint and this run must have in common."""
        fixed = {**begins_with, "loss": identity_values(self.loss), "images": table.digest}
        return _digest(fixed, self.train)


def _plan(
    uris: Sequence[str],
    manifests: "Sequence[Manifest]",
    columns: tuple[str, ...],
    holdout_rows: int,
    train: TrainConfig,
) -> "StreamPlan":
    from d2f_core.data.size_tables import is_by_size, shared_holdout, tables_of
    from d2f_core.data.table_plan import plan_tables

    tables, held = [], []
    for uri, manifest in zip(uris, manifests, strict=True):
        its = tables_of(uri, manifest)
        tables += its
        several = is_by_size(manifest)
        held += shared_holdout([each.num_rows for _, each in its], holdout_rows) if several else [holdout_rows]
    return plan_tables(
        [uri for uri, _ in tables],
        [each for _, each in tables],
        columns,
        order_of(train),
        holdout_rows=held,
        num_steps=train.num_steps,
        in_proportion_to="rows" if any(map(is_by_size, manifests)) else "batches",
    )


def order_of(train: TrainConfig) -> "OrderConfig":
    """The sample-order settings of a training."""
    from d2f_core.data.table_plan import OrderConfig

    return OrderConfig(
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        lanes=train.lanes,
        window_rows=train.window_rows,
    )


def _digest(fixed: Mapping[str, Any], train: TrainConfig) -> str:
    return identity_hash({**fixed, **order_of(train).identity()})
