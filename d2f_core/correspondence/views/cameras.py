"""Cameras around an object, drawn so that all of it lies in the image."""

from dataclasses import dataclass

import numpy as np

VIEW_DEGREES = (28.0, 50.0)
"""Field of view across the image."""
ELEVATIONS = (5.0, 40.0)
"""Degrees above the horizon; the floor is never seen from below."""
FILLS = (0.6, 0.92)
"""The object's longer side in the image, as a share of the image's."""
ROLL_DEGREES = 6.0
"""Standard deviation of the rotation about the optical axis."""


@dataclass(frozen=True, kw_only=True)
class ViewCamera:
    """A pinhole camera; conventions as in `multiview.Camera`, in float64."""

    intrinsics: np.ndarray
    """[3, 3] in pixels."""
    rotation: np.ndarray
    """World to camera, [3, 3]."""
    translation: np.ndarray
    """World to camera, [3]."""
    azimuth: float
    """Degrees from the object's front, towards its left."""
    elevation: float
    """Degrees above the horizon."""

    @property
    def centre(self) -> np.ndarray:
        return -self.rotation.T @ self.translation

    def project(self, points: np.ndarray) -> np.ndarray:
        """Positions in pixels [n, 2] of points of the world [n, 3] before the camera."""
        seen = (points[:, None] * self.rotation).sum(-1) + self.translation
        focal = self.intrinsics.diagonal()[:2]
        return seen[:, :2] / seen[:, 2:] * focal + self.intrinsics[:2, 2]

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """Directions in the world [n, 3] of positions in pixels [n, 2], with a depth of 1 and the pixels' dtype."""
        x, y = ((pixels - self.intrinsics[:2, 2]) / self.intrinsics.diagonal()[:2]).T[:, :, None]
        return (x * self.rotation[0] + y * self.rotation[1] + self.rotation[2]).astype(pixels.dtype)


def draw_camera(rng: np.random.Generator, points: np.ndarray, size: int, azimuth: float) -> ViewCamera:
    """A camera from which all points [n, 3] lie in the square image of `size` pixels.

    Field of view, elevation, distance and roll are drawn; so is where in the image the object lies, by moving the
    principal point, as if the image were cut out of a larger one.
    """
    elevation, roll = rng.uniform(*ELEVATIONS), np.radians(rng.normal(0, ROLL_DEGREES))
    rotation = _rotation(np.radians(azimuth), np.radians(elevation), roll)
    focal = size / 2 / np.tan(np.radians(rng.uniform(*VIEW_DEGREES)) / 2)
    wanted = size * rng.uniform(*FILLS)
    seen = (points[:, None] * rotation).sum(-1)
    distance = 3.0
    for _ in range(20):  # the size in the image falls with the distance nearly as 1 / distance
        low, high = _bounds(seen, distance, focal)
        distance *= float((high - low).max()) / wanted
    low, high = _bounds(seen, distance, focal)
    free = np.maximum(size - (high - low), 0) / 2
    principal = size / 2 - (low + high) / 2 + 0.9 * free * rng.uniform(-1, 1, 2)
    intrinsics = np.array([[focal, 0, principal[0]], [0, focal, principal[1]], [0, 0, 1]])
    return ViewCamera(
        intrinsics=intrinsics,
        rotation=rotation,
        translation=np.array([0, 0, distance]),
        azimuth=float(azimuth),
        elevation=float(elevation),
    )


def _rotation(azimuth: float, elevation: float, roll: float) -> np.ndarray:
    """World to camera for a camera that looks at the origin; its rows are right, down and forward."""
    across = np.array([np.cos(azimuth), np.sin(azimuth), 0])
    forward = -np.array([*(np.cos(elevation) * across[:2]), np.sin(elevation)])
    right = np.array([-across[1], across[0], 0.0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward])


def _bounds(seen: np.ndarray, distance: float, focal: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest x and y, in pixels from the optical axis, of points in a frame that is turned like the camera
    and has the origin of the world.
    """
    image = focal * seen[:, :2] / (seen[:, 2:] + distance)
    return image.min(0), image.max(0)
