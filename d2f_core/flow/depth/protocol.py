"""How depth errors are measured: which pixels of the truth count, how a map is fitted to them, and where it is cut off.

Figures of two evaluations can stand side by side only if all of this is the same.
"""

from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from d2f_core.flow.depth.config import Alignment, DepthEvaluationError, EvaluateDepthConfig, Mask

ALIGNED = MappingProxyType(
    {
        "scale_shift": "scale and shift per image, least squares on the valid pixels",
        "scale": "scale per image, least squares on the valid pixels",
        "median": "scale per image, ratio of the medians of the valid pixels",
        "none": "none: predictions in metres",
    }
)
KITTI_CROPS = MappingProxyType(
    {
        "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
        "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    }
)
"""First and last row, first and last column, as shares of height and width. Sources: Garg et al., ECCV 2016,
arXiv:1603.04992; Eigen et al., 2014, arXiv:1406.2283; the numbers are those of Godard et al. (Monodepth), CVPR 2017,
arXiv:1609.03677, which everybody uses since."""
NYU_SHAPE, NYU_CROP = (480, 640), (45, 471, 41, 601)
"""Of Eigen et al. too: the part on which NYU's depth is measured and not filled in."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    alignment: Alignment = "scale_shift"
    min_depth: float = 1e-3
    """Metres: truth counts above it, and fitted maps are raised to it."""
    max_depth: float | None = None
    """Metres: truth counts below it, and fitted maps are lowered to it."""
    mask: Mask = "none"
    square: bool = False
    """Whether only the centre squares are compared, as must be where one of the predictions covers no more."""

    @classmethod
    def of(cls, config: EvaluateDepthConfig, *, square: bool) -> "Protocol":
        return cls(
            alignment=config.alignment, min_depth=config.min_depth, max_depth=config.max_depth, mask=config.mask,
            square=square,
        )  # fmt: skip

    def window(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of a truth of this size that count.

        Raises:
            DepthEvaluationError: NYU's mask for a truth of another size.
        """
        if self.mask == "none":
            return slice(height), slice(width)
        if self.mask == "nyu_eigen":
            if (height, width) != NYU_SHAPE:
                raise DepthEvaluationError(
                    f"mask='nyu_eigen' is made for truth of 640x480 px, not {width}x{height}. Use 'none', or the "
                    "truth at its own size."
                )
            top, bottom, left, right = NYU_CROP
        else:
            first, last, start, end = KITTI_CROPS[self.mask]
            top, bottom, left, right = int(first * height), int(last * height), int(start * width), int(end * width)
        return slice(top, bottom), slice(left, right)

    @property
    def aspect(self) -> str:
        return "centre squares" if self.square else "whole images"

    @property
    def words(self) -> str:
        """In a line, for titles."""
        cap = f"{self.min_depth:g} to {self.max_depth:g} m" if self.max_depth else f"above {self.min_depth:g} m, no cap"
        return f"alignment {self.alignment}, truth {cap}, mask {self.mask}, {self.aspect}"

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if name != "square"}
        return {**values, "alignment": ALIGNED[self.alignment], "aspect": self.aspect, "protocol": self.words}
