"""The config of a table of pairs. Imports neither torch nor a model, because the tasks that read and write import this
module.
"""

from dataclasses import dataclass, field

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.correspondence.config import TargetConfig
from d2f_core.data.sources.config import PairSource


class PairsError(ValueError):
    """Pairs cannot be embedded as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class PairsWork:
    """Which pairs, of which images, and what is stored of each."""

    features: str = ""
    """Table that `embed_images` wrote, which holds all images of the pairs."""
    mined: str = ""
    """Table of pairs that `mine_pairs` wrote."""
    pairs: PairSource = field(default_factory=PairSource)
    """In place of `mined`: SPair-71k or pairs of one's own. Their keypoints and boxes are not used, and rows or lines
    may be without. An image is found by its file, or else by its bytes."""
    within_category: int = 0
    """In place of both: pairs of each image with so many others of its category, drawn by a hash of their ids; of views
    with those of other things."""
    targets: TargetConfig = field(default_factory=TargetConfig)
    patch: int = 14
    """Height and width of the student's patches in pixels: targets are made for the tokens of its grid."""
    output: str = ""
    """Where the table is written; repeating the command resumes the job, and does nothing once it is complete."""
    max_quarantined_share: float = 0.01
    """Largest share of unusable pairs before the job stops; duplicates do not count."""
    rows_per_part: int = 64
    """Pairs per output file, the most that is lost when a task is killed."""
    batch_size: int = 8
    """Pairs whose features are read together, while targets are made of those before."""
    cache_gb: float = 1.0
    """GB (1e9 bytes) of features that an actor keeps in memory beside those, for the pairs that come next."""
    num_readers: int = 2
    """Number of parallel tasks that read the source."""


@dataclass(frozen=True, kw_only=True)
class EmbedPairsConfig(AwaitedPoolConfig, PairsWork):
    """Pairs of images and their teachers' match targets, as a table that a student is trained on."""

    num_actors: int = 1
    """Number of processes that compute the targets."""

    def __post_init__(self) -> None:
        self.check_counts("rows_per_part", "batch_size", "num_readers", "patch", error=PairsError)
        for name in ("within_category", "cache_gb"):
            if getattr(self, name) < 0:
                raise PairsError(f"{name}={getattr(self, name)} must be at least 0.")
        if not 0 <= self.max_quarantined_share <= 1:
            raise PairsError(f"max_quarantined_share={self.max_quarantined_share} must lie in [0, 1]. Use 0.01.")
