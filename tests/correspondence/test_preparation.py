"""An image and its points go the same way."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence.preparation import NORMALISATIONS, Preparation


def spot(height: int, width: int, x: int, y: int) -> np.ndarray:
    """Black but for a white square of 10 px around the pixel edge (x, y)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[y - 5 : y + 5, x - 5 : x + 5] = 255
    return image


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (101, 60), (80, 80)])
def test_a_point_falls_where_the_frame_says(fit: str, height: int, width: int) -> None:
    preparation = Preparation(size=84, normalisation="none", fit=fit)  # type: ignore[arg-type]
    x, y = width // 3, height // 2
    seen = preparation.pixels([spot(height, width, x, y)])[0].mean(dim=0)
    places = torch.arange(84) + 0.5
    found = (seen.sum(dim=0) @ places / seen.sum()).item(), (seen.sum(dim=1) @ places / seen.sum()).item()
    size, corner = preparation.frame((width, height))
    wanted = (x + corner[0]) / size[0] * 84, (y + corner[1]) / size[1] * 84
    assert found == pytest.approx(wanted, abs=0.1)


def test_images_of_several_sizes_make_one_input() -> None:
    images = [np.full((height, width, 3), 255, np.uint8) for height, width in ((10, 20), (14, 14), (300, 7))]
    found = Preparation(size=14, normalisation="half").pixels(images)
    assert_close(found, torch.ones(3, 3, 14, 14))


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_pixels_are_normalised_as_the_name_says(name: str) -> None:
    image = np.zeros((14, 14, 3), np.uint8)
    image[:] = (0, 51, 255)
    mean, std = NORMALISATIONS[name]
    wanted = [(value - m) / s for value, m, s in zip((0.0, 0.2, 1.0), mean, std, strict=True)]
    assert Preparation(size=14, normalisation=name).pixels([image])[0, :, 3, 5].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 3000}, "from 14 to 2048"),
        ({"size": 224, "normalisation": "clip"}, "imagenet, none, half"),
        ({"size": 224, "fit": "crop"}, "'stretch' or 'pad'"),
    ],
)
def test_an_unknown_preparation_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preparation(**fields)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[h, w, 3\]"):
        Preparation(size=14).pixels([image])
