"""Views of one scene: cameras, the same point in two images, and targets that it gives to the tokens of a grid.

A camera is a pinhole: a point X of the world has the coordinates `Y = rotation @ X + translation` in the camera's frame
(x to the right, y down, z forward), its depth is `Y_z`, and its image lies at `intrinsics @ Y / Y_z`. Positions are
(x, y) in pixels; in an image of width W and height H they run from 0 to W and from 0 to H, so the centre of the first
pixel is (0.5, 0.5). A depth map holds the depth at the pixels' centres, NaN where there is none.

Leading dimensions broadcast: `...` below is that of the camera, and of what it is given.

Source: Hartley and Zisserman, "Multiple View Geometry in Computer Vision", 2004, chapter 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Height and width in tokens."""
Size = tuple[float, float]
"""Width and height in pixels."""
CastRay = Callable[[Tensor, Tensor], Tensor]
"""Origins [..., 3] and unit directions [..., 3] of rays -> distance [...] to the first surface, infinite for none."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One or more pinhole cameras."""

    intrinsics: Tensor
    """Upper triangular [..., 3, 3] in pixels: focal lengths on the diagonal, principal point in the last column."""
    rotation: Tensor
    """World to camera, [..., 3, 3]; its rows are the camera's right, down and forward in the world."""
    translation: Tensor
    """World to camera, [..., 3], in units of the world."""

    @property
    def centre(self) -> Tensor:
        """Position in the world [..., 3]: `-rotation^T @ translation`."""
        return -(self.rotation.mT @ self.translation[..., None])[..., 0]

    @property
    def direction(self) -> Tensor:
        """Viewing direction [..., 3]: the optical axis in the world, of length 1."""
        return self.rotation[..., 2, :]


def project(camera: Camera, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where points of the world [..., n, 3] lie in the image.

    Returns:
        Positions in pixels [..., n, 2] and depths [..., n]. A point with a depth of 0 or less is behind the camera: its
        position means nothing.
    """
    seen = points @ camera.rotation.mT + camera.translation[..., None, :]
    image = seen @ camera.intrinsics.mT
    return image[..., :2] / image[..., 2:], seen[..., 2]


def unproject(camera: Camera, pixels: Tensor, depth: Tensor) -> Tensor:
    """The points of the world [..., n, 3] at positions [..., n, 2] in pixels and at depths [..., n]."""
    ones = torch.ones_like(pixels[..., :1])
    rays = torch.cat([pixels, ones], -1) @ torch.linalg.inv(camera.intrinsics).mT  # their depth is 1
    return (rays * depth[..., None] - camera.translation[..., None, :]) @ camera.rotation


def pixel_centres(size: Size, like: Tensor) -> Tensor:
    """Centres of the pixels of an image [height * width, 2], row by row, with dtype and device of `like`."""
    x, y = (torch.arange(int(side), dtype=like.dtype, device=like.device) + 0.5 for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def inside(pixels: Tensor, size: Size) -> Tensor:
    """Which positions [..., 2] lie in the image, bool [...]; NaN does not."""
    return (pixels >= 0).all(-1) & (pixels[..., 0] < size[0]) & (pixels[..., 1] < size[1])


def depth_at(depth_map: Tensor, pixels: Tensor) -> Tensor:
    """Depth [..., n] at positions [..., n, 2], between the centres of pixels; depth map [..., height, width].

    The inverse of the depth is interpolated bilinearly, and continued over the last half pixel to the image's border.
    That is exact on a plane, where 1 / depth is affine in the position. NaN outside the image, and where one of the
    four nearest pixels has no depth.
    """
    height, width = depth_map.shape[-2:]
    known = inside(pixels, (width, height))
    position = torch.where(known[..., None], pixels - 0.5, 0)
    corner = position.floor().clamp(min=0).minimum(position.new_tensor([width - 2, height - 2]).clamp(min=0))
    across, down = (position - corner).unbind(-1)
    left, top = corner.long().unbind(-1)
    flat = depth_map.flatten(-2).reciprocal().expand(*pixels.shape[:-2], height * width)

    def inverse(right: int, below: int) -> Tensor:
        return flat.gather(-1, (top + below).clamp(max=height - 1) * width + (left + right).clamp(max=width - 1))

    above = inverse(0, 0) * (1 - across) + inverse(1, 0) * across
    under = inverse(0, 1) * (1 - across) + inverse(1, 1) * across
    return torch.where(known, 1 / (above * (1 - down) + under * down), math.nan)


def visible(camera: Camera, points: Tensor, depth_map: Tensor, tolerance: float = 0.01) -> tuple[Tensor, Tensor]:
    """Which points of the world [..., n, 3] a camera sees, by its depth map [..., height, width].

    A point is seen if it lies in front of the camera and inside the image, and its depth is that of the map there, to
    within `tolerance` times the depth. A point outside is rejected and never moved to the border.

    Returns:
        Positions in pixels [..., n, 2], and which points are seen, bool [..., n].

    Raises:
        ValueError: the tolerance is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} is negative. Give a share of the depth, such as 0.01.")
    pixels, depth = project(camera, points)
    return pixels, (depth > 0) & ((depth_at(depth_map, pixels) - depth).abs() <= tolerance * depth)


def visible_by_ray(
    camera: Camera, points: Tensor, size: Size, cast: CastRay, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Like `visible`, exactly: a point is seen if the ray towards it meets nothing before it.

    Args:
        size: width and height of the image.
        cast: finds the first surface along rays.
        tolerance: how far before the point the ray may end, as a share of the distance.
    """
    pixels, depth = project(camera, points)
    origin = camera.centre[..., None, :].expand_as(points)
    distance = (points - origin).norm(dim=-1)
    free = cast(origin, (points - origin) / distance[..., None]) >= (1 - tolerance) * distance
    return pixels, free & (depth > 0) & inside(pixels, size)


def viewing_angles(camera: Camera) -> Tensor:
    """Angles between the viewing directions of n cameras, in degrees [..., n, n].

    By the tangent of half the angle, |a - b| / |a + b|, which stays exact where a cosine is flat.
    """
    first, second = camera.direction[..., :, None, :], camera.direction[..., None, :, :]
    return torch.rad2deg(2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)))


def overlaps(camera: Camera, depth_maps: Tensor, tolerance: float = 0.01) -> Tensor:
    """Share of the surface in each of n views that each other view sees, [n, n]; NaN for a view without surface.

    Args:
        camera: n cameras.
        depth_maps: [n, height, width].
        tolerance: see `visible`.
    """
    height, width = depth_maps.shape[-2:]
    centres = pixel_centres((width, height), depth_maps).expand(len(depth_maps), -1, -1)
    depth = depth_maps.flatten(1)
    points = unproject(camera, centres, depth)
    rows = []
    for view, known in zip(points, depth > 0, strict=True):
        surface = view[known].expand(len(depth_maps), -1, -1)
        rows.append(visible(camera, surface, depth_maps, tolerance)[1].to(depth.dtype).mean(-1))
    return torch.stack(rows)


def choose_pairs(
    angles: Tensor, overlap: Tensor, *, angle_range: tuple[float, float], least_overlap: float = 0.0
) -> Tensor:
    """Pairs of views (first < second), int64 [pairs, 2], in lexical order.

    Args:
        angles: degrees [n, n].
        overlap: see `overlaps`; the smaller share of a pair's two counts, and NaN is never enough.
        angle_range: a pair's angle is at least the first and less than the second.

    Raises:
        ValueError: the range is empty.
    """
    low, high = angle_range
    if not low < high:
        raise ValueError(f"angle_range={angle_range} is empty. Give the smaller angle first, such as (0, 30).")
    good = (angles >= low) & (angles < high) & (torch.minimum(overlap, overlap.mT) >= least_overlap)
    return good.triu(1).nonzero()


def soft_targets(points: Tensor, grid: Grid, size: Size) -> Tensor:
    """The distribution over a grid's tokens that stands for each position, [..., n, height * width of the grid].

    The weights are bilinear: they lie on up to four tokens whose centres surround the position, sum to 1, and their
    mean of the centres is the position itself. Within half a token of the image's border it is the nearest position
    that centres do surround.

    Args:
        points: [..., n, 2] in pixels.
        size: width and height of the image.

    Raises:
        ValueError: a position lies outside the image.
    """
    if not bool(inside(points, size).all()):
        outside = points[~inside(points, size)][0].tolist()
        raise ValueError(
            f"point ({outside[0]:g}, {outside[1]:g}) lies outside the image of {size[0]:g} x {size[1]:g} pixels, so no "
            "token is its target. Leave out points that `inside` or `visible` reject."
        )
    height, width = grid
    rows = _hat(points[..., 1] * (height / size[1]) - 0.5, height)
    columns = _hat(points[..., 0] * (width / size[0]) - 0.5, width)
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)


def _hat(position: Tensor, count: int) -> Tensor:
    """Weights [..., count] of linear interpolation at positions [...] among cells whose centres are 0 ... count - 1."""
    cells = torch.arange(count, dtype=position.dtype, device=position.device)
    return (1 - (position.clamp(0, count - 1)[..., None] - cells).abs()).clamp(min=0)
