"""Which images become pairs and clusters. Imports neither torch nor a model."""

from dataclasses import dataclass
from typing import Literal

CLUSTERS = "clusters"
"""Directory of the clusters' table in the output."""


class MineError(ValueError):
    """Pairs cannot be mined as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class MinePairsConfig:
    """Pairs of images with similar embeddings, as a table, and clusters of such images, as another."""

    features: str = ""
    """Table that `embed_images` wrote."""
    column: str = "embedding"
    """Its column that is compared: embeddings, or a teacher's features, whose tokens are brought to length 1 and
    averaged. Every part reads the whole column: of many images compare embeddings (`embed_images --embedding`)."""
    apart: Literal["", "category", "mesh"] = ""
    """Column whose equal values tell near-duplicates, which are never paired: `mesh`, the thing that views show;
    `category`, the directory of images, where each holds the frames of a video. Empty: all images may be paired.
    They share a cluster only where an image's partners are of too few things or videos for another: raise partners."""
    partners: int = 10
    """Most of each image."""
    cluster_size: int = 0
    """Least number of images of a cluster, which is the micro-batch of a training by clusters; 0: no clusters."""
    output: str = ""
    """Where the table of pairs is written, and that of clusters to `clusters` below it. Repeating the command goes on,
    and does nothing once both are complete."""
    rows_per_part: int = 4096
    """Images per output file, the most that is lost when a task is killed."""
    num_tasks: int = 2
    """Files made in parallel, one logical CPU each."""

    def __post_init__(self) -> None:
        for name in ("partners", "rows_per_part", "num_tasks"):
            if getattr(self, name) < 1:
                raise MineError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.cluster_size and not 2 <= self.cluster_size <= self.partners + 1:
            raise MineError(
                f"cluster_size={self.cluster_size} must be 0 or from 2 to partners + 1 = {self.partners + 1}: a "
                "cluster is an image and some of its partners. Raise partners."
            )

    @property
    def clusters(self) -> str:
        """URI of the table of clusters."""
        return f"{self.output.rstrip('/')}/{CLUSTERS}"
