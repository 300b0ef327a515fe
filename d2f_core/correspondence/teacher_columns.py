"""The teachers' columns of a table of features, and how a pair is compared by them: fused, on the student's grid."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from d2f_core.correspondence.config import DistillationConfig, TargetConfig
from d2f_core.correspondence.embed.config import FEATURES, column_of, teacher_of
from d2f_core.correspondence.matching import Grid
from d2f_core.correspondence.teachers import fuse, resample
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.storage import check_reachable


@dataclass(frozen=True, kw_only=True)
class TeacherColumn:
    """Where a table holds the features of a teacher."""

    name: str
    """Of the teacher."""
    grid: Grid

    @property
    def column(self) -> str:
        """Name of the column: float16 [tokens, channels]."""
        return column_of(self.name)


def checked_features(features: str, output: str, error: type[ValueError]) -> Manifest:
    """The manifest of a table of features that a job reads, after it was found that the job can read and write.

    Raises:
        ValueError: as `error`, a place is empty or the table is of another kind; unusable storage.
    """
    for name, uri in (("features", features), ("output", output)):
        if not uri:
            raise error(f"{name} is empty. Give --{name} URI.")
    check_reachable(features)
    check_reachable(output, write=True)
    manifest = read_manifest(features)
    if manifest.kind != FEATURES:
        raise error(f"features={features!r} holds {manifest.kind}. Give a table that embed_images wrote.")
    return manifest


def teachers_of(manifest: Manifest) -> list[TeacherColumn]:
    """The teachers' columns of a table of features."""
    found = []
    for column, (tokens, _) in manifest.fingerprint["shapes"].items():
        side = round(tokens**0.5)
        found.append(TeacherColumn(name=teacher_of(column), grid=(side, side)))
    return found


def shares_of(teachers: Sequence[TeacherColumn], config: DistillationConfig | TargetConfig) -> list[float]:
    """Each teacher's share in the fusion.

    Raises:
        ValueError: shares are given, and not one for each teacher.
    """
    names = [teacher.name for teacher in teachers]
    if config.shares and set(config.shares) != set(names):
        raise ValueError(
            f"shares={dict(config.shares)} are not one for each of the table's teachers, "
            f"{', '.join(names)}. Name each, or none."
        )
    return [config.shares.get(name, 1.0) for name in names]


def fused(
    teachers: Sequence[tuple[Tensor, Grid]],
    grid: Grid,
    shares: Sequence[float],
    config: DistillationConfig | TargetConfig,
) -> tuple[Tensor, Tensor]:
    """The teachers' features on the student's grid, and on the grid `finer` times as fine; [images, tokens, channels].

    Each teacher is brought to the finer grid from its own, which may be finer than the student's.
    """
    fine = (grid[0] * config.finer, grid[1] * config.finer)
    coarse, finer = (
        fuse([resample(features.float(), own, to) for features, own in teachers], shares) for to in (grid, fine)
    )
    return coarse, finer
