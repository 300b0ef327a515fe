"""The teachers' columns of a table of features, and how a pair is compared by them: fused, on the student's grid."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from d2f_core.correspondence.config import DistillationConfig, TargetConfig
from d2f_core.correspondence.embed.config import column_of, teacher_of
from d2f_core.correspondence.matching import Grid
from d2f_core.correspondence.teachers import fuse, resample
from d2f_core.data.manifest import Manifest


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
