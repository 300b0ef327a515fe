"""Views of one scene: points go to pixels and back, what is hidden or outside is rejected, targets are exact."""

import math

import pytest
import torch

from d2f_core.correspondence.multiview import (
    Camera,
    choose_pairs,
    depth_at,
    inside,
    overlaps,
    pixel_centres,
    project,
    soft_targets,
    unproject,
    viewing_angles,
    visible,
    visible_by_ray,
)

WIDTH, HEIGHT = 48, 20
INTRINSICS = torch.tensor([[40.0, 0, 24], [0, 30.0, 10], [0, 0, 1]], dtype=torch.float64)


def camera_at(degrees: float, distance: float = 4.0) -> Camera:
    """Looks at the origin from a circle around the vertical axis y, which points down; at 0 degrees along z."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]], dtype=torch.float64)
    translation = torch.tensor([0, 0, distance], dtype=torch.float64)
    return Camera(intrinsics=INTRINSICS, rotation=rotation, translation=translation)


def stacked(*cameras: Camera) -> Camera:
    names = ("intrinsics", "rotation", "translation")
    return Camera(**{name: torch.stack([getattr(camera, name) for camera in cameras]) for name in names})


def points_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.7


def plane_depth(camera: Camera, normal: torch.Tensor, offset: float) -> torch.Tensor:
    """Depth [HEIGHT, WIDTH] of the plane `normal @ X = offset`, by the ray through each pixel's centre."""
    rays = pixel_centres((WIDTH, HEIGHT), INTRINSICS)
    directions = unproject(camera, rays, torch.ones(len(rays), dtype=torch.float64)) - camera.centre
    return ((offset - normal @ camera.centre) / (directions @ normal)).reshape(HEIGHT, WIDTH)


def test_a_point_lies_where_hand_computation_says():
    """At 90 degrees the camera's right is -z, its forward x: (1, 2, 3) has the coordinates (-3, 2, 1 + 4)."""
    pixels, depth = project(camera_at(90), torch.tensor([[1.0, 2, 3]], dtype=torch.float64))
    torch.testing.assert_close(depth, torch.tensor([5.0], dtype=torch.float64))
    expected = torch.tensor([[24 + 40 * -3 / 5, 10 + 30 * 2 / 5]], dtype=torch.float64)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(camera_at(90).centre, torch.tensor([-4.0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(camera_at(90).direction, torch.tensor([1.0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_unproject_undoes_project_for_each_of_several_cameras(dtype, bound):
    one = stacked(*map(camera_at, (0, 33, 71, 180)))
    cameras = Camera(
        intrinsics=one.intrinsics.to(dtype), rotation=one.rotation.to(dtype), translation=one.translation.to(dtype)
    )
    pixels, depth = project(cameras, points_of(50).to(dtype))
    assert pixels.shape == (4, 50, 2) and depth.shape == (4, 50)
    again, _ = project(cameras, unproject(cameras, pixels, depth))
    assert (again - pixels).abs().max() < bound


def test_a_pixel_of_one_view_is_found_in_another_through_the_world():
    first, second = camera_at(0), camera_at(25)
    normal = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    depth = plane_depth(first, normal, 0.1).flatten()
    points = unproject(first, pixel_centres((WIDTH, HEIGHT), depth), depth)
    assert (points @ normal - 0.1).abs().max() < 1e-12
    _, seen = visible(second, points, plane_depth(second, normal, 0.1))
    pixels, _ = project(second, points)
    assert torch.equal(seen, inside(pixels, (WIDTH, HEIGHT))) and 0 < seen.sum() < len(seen)


def test_between_pixels_the_depth_of_a_tilted_plane_is_exact():
    camera, normal = camera_at(20), torch.tensor([0.5, 0.4, 1.0], dtype=torch.float64)
    depth = plane_depth(camera, normal, 0.2)
    pixels = torch.tensor([[0, 0], [0.2, 9], [7.13, 3.9], [20.5, 11], [47.99, 19.7]], dtype=torch.float64)
    found = unproject(camera, pixels, depth_at(depth, pixels))
    assert (found @ normal - 0.2).abs().max() < 1e-12


def test_outside_the_image_and_beside_a_pixel_without_depth_there_is_none():
    depth = torch.full((HEIGHT, WIDTH), 2.0)
    depth[5, 7] = math.nan
    pixels = torch.tensor([[-0.1, 3], [3, -0.1], [48, 3], [3, 20], [-5, 3], [3, 99], [7.2, 5.2], [math.nan, 3]])
    assert depth_at(depth, pixels).isnan().all()
    assert (depth_at(depth, torch.tensor([[0, 3], [47.9, 19.9], [9, 5.2]])) == 2).all()
    assert (depth_at(torch.full((1, 1), 3.0), torch.tensor([[0.5, 0.5]])) == 3).all()


def test_each_view_of_a_batch_is_read_at_its_own_depth():
    maps = torch.stack([torch.full((HEIGHT, WIDTH), value) for value in (2.0, 5.0)])
    assert depth_at(maps, torch.full((2, 3, 2), 6.0)).tolist() == [[2.0] * 3, [5.0] * 3]


def test_a_point_behind_a_surface_is_rejected_and_one_on_it_is_not():
    wall = torch.full((HEIGHT, WIDTH), 3.0, dtype=torch.float64)
    points = torch.tensor([[0.1, 0, -1], [0.1, 0, -0.98], [0.1, 0, 0.5], [0.1, 0, -1.5]], dtype=torch.float64)
    _, seen = visible(camera_at(0), points, wall)
    assert seen.tolist() == [True, True, False, False]  # on it; 2 cm behind it, of 3 m; far behind; before it
    _, strict = visible(camera_at(0), points, wall, tolerance=1e-6)
    assert strict.tolist() == [True, False, False, False]


def test_points_outside_the_image_or_behind_the_camera_are_rejected_and_not_moved_to_its_border():
    camera = camera_at(0)
    wall = torch.full((HEIGHT, WIDTH), 4.0, dtype=torch.float64)
    outside = torch.tensor([[2.6, 0, 0], [-2.6, 0, 0], [0, 1.6, 0], [0, -1.6, 0], [0, 0, -8]], dtype=torch.float64)
    pixels, seen = visible(camera, outside, wall)
    assert not seen.any()
    torch.testing.assert_close(pixels[0], torch.tensor([24 + 40 * 2.6 / 4, 10.0], dtype=torch.float64))
    within = torch.tensor([[2.2, 0, 0], [0, 1.2, 0]], dtype=torch.float64)
    assert visible(camera, within, wall)[1].all()


def test_an_image_is_half_open_and_wider_than_high():
    pixels = torch.tensor([[0, 0], [47.9, 19.9], [48, 5], [5, 20], [30, 25], [-0.1, 5], [math.nan, 5]])
    assert inside(pixels, (WIDTH, HEIGHT)).tolist() == [True, True, False, False, False, False, False]


def test_by_rays_what_a_ball_hides_is_rejected():
    """A ball of radius 1 around the origin: its near pole is seen, its far pole and what lies behind it are not."""

    def cast(origin: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        along = -(origin * direction).sum(-1)
        inner = along**2 - (origin**2).sum(-1) + 1
        return torch.where(inner > 0, along - inner.clamp(min=0).sqrt(), math.inf)

    points = torch.tensor([[0, 0, -1], [0, 0, 1], [0.05, 0, 3], [1.5, 0, 0.5], [9, 0, 0], [0, 0, -9]]).double()
    _, seen = visible_by_ray(camera_at(0), points, (WIDTH, HEIGHT), cast)
    assert seen.tolist() == [True, False, False, True, False, False]


def test_angles_are_those_between_viewing_directions_also_where_a_cosine_is_flat():
    cameras = stacked(*map(camera_at, (0, 30, 120, 180, 0)), camera_at(1e-6))
    expected = torch.tensor([0, 30, 120, 180, 0, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(viewing_angles(cameras)[0], expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(viewing_angles(cameras), viewing_angles(cameras).mT)


def test_views_overlap_by_the_share_of_their_surface_that_the_other_sees():
    """Seen straight on, a second camera further to the right by a quarter of the image sees three quarters of it."""
    near = camera_at(0)
    aside = Camera(
        intrinsics=INTRINSICS,
        rotation=near.rotation,
        translation=near.translation - torch.tensor([WIDTH / 4 * 4 / 40, 0, 0], dtype=torch.float64),
    )
    blind = torch.full((HEIGHT, WIDTH), math.nan, dtype=torch.float64)
    maps = torch.stack([torch.full_like(blind, 4.0), torch.full_like(blind, 4.0), blind])
    share = overlaps(stacked(near, aside, near), maps)
    torch.testing.assert_close(share[:2, :2], torch.tensor([[1, 0.75], [0.75, 1]], dtype=torch.float64))
    assert share[2].isnan().all() and (share[:2, 2] == 0).all()


def test_pairs_are_chosen_by_angle_and_by_the_smaller_overlap():
    angles = torch.tensor([[0.0, 20, 50], [20, 0, 30], [50, 30, 0]])
    overlap = torch.tensor([[1.0, 0.9, 0.8], [0.2, 1, 0.5], [0.8, 0.5, 1]])
    assert choose_pairs(angles, overlap, angle_range=(0, 90)).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert choose_pairs(angles, overlap, angle_range=(0, 90), least_overlap=0.5).tolist() == [[0, 2], [1, 2]]
    assert choose_pairs(angles, overlap, angle_range=(20, 30)).tolist() == [[0, 1]]
    unknown = overlap.clone()
    unknown[0] = math.nan
    assert choose_pairs(angles, unknown, angle_range=(0, 90)).tolist() == [[1, 2]]


GRID = (5, 6)
"""Of an image of 48 x 20: tokens of 8 x 4 pixels."""


def expectation(targets: torch.Tensor) -> torch.Tensor:
    return targets @ (pixel_centres((GRID[1], GRID[0]), targets) * torch.tensor([8.0, 4.0]).to(targets))


def test_a_soft_target_lies_on_the_four_tokens_around_a_point():
    """(14, 7) lies 1/4 of a token right of the centre of column 1, and 1/4 below that of row 1."""
    [target] = soft_targets(torch.tensor([[14.0, 7.0]], dtype=torch.float64), GRID, (WIDTH, HEIGHT)).reshape(1, *GRID)
    expected = torch.zeros(GRID, dtype=torch.float64)
    expected[1:3, 1:3] = torch.tensor([[9, 3], [3, 1]]) / 16
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-15)


def test_the_mean_of_a_soft_target_is_the_point_itself_inside_the_grid():
    points = torch.rand(4, 100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = points * torch.tensor([WIDTH - 8, HEIGHT - 4]) + torch.tensor([4, 2])
    targets = soft_targets(points, GRID, (WIDTH, HEIGHT))
    assert targets.shape == (4, 100, 30) and (targets >= 0).all() and ((targets > 0).sum(-1) <= 4).all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(4, 100, dtype=torch.float64))
    torch.testing.assert_close(expectation(targets), points, rtol=0, atol=1e-12)


def test_at_the_border_the_weights_go_to_the_nearest_tokens():
    points = torch.tensor([[0.0, 0.0], [47.9, 8.0], [20.0, 19.5]], dtype=torch.float64)
    targets = soft_targets(points, GRID, (WIDTH, HEIGHT))
    nearest = torch.tensor([[4.0, 2.0], [44.0, 8.0], [20.0, 18.0]], dtype=torch.float64)
    torch.testing.assert_close(expectation(targets), nearest, rtol=0, atol=1e-12)
    torch.testing.assert_close(targets.sum(-1), torch.ones(3, dtype=torch.float64))
    assert targets[0, 0] == 1


@pytest.mark.parametrize("outside", [[48.0, 5.0], [5.0, 20.5], [-0.1, 5.0], [math.nan, 5.0]])
def test_a_point_outside_the_image_has_no_target(outside):
    with pytest.raises(ValueError, match=r"lies outside the image of 48 x 20 pixels.*Leave out"):
        soft_targets(torch.tensor([[5.0, 5.0], outside]), GRID, (WIDTH, HEIGHT))


def test_ranges_that_hold_nothing_are_refused():
    with pytest.raises(ValueError, match=r"angle_range=\(30, 30\) is empty"):
        choose_pairs(torch.zeros(2, 2), torch.ones(2, 2), angle_range=(30, 30))
    with pytest.raises(ValueError, match=r"tolerance=-0\.1 is negative"):
        visible(camera_at(0), points_of(2), torch.ones(4, 4, dtype=torch.float64), tolerance=-0.1)
