"""The colour matrix against torchvision's own jitter, on float images and on PIL's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import functional as F

from fast_spatial.kernels.colour import write_colour_matrix, write_mean_rgb
from fast_spatial.kernels.warp import warp

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
FACTORS = [(0.9, 1.1, 0.93), (1.1, 0.9, 1.07), (0.8, 1.3, 0.6), (1.25, 0.7, 1.4), (1.0, 1.0, 1.2), (1.1, 1.0, 1.0)]


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    """A photograph squeezed to middle values, so that no step of the jitter clips, with a colour cast."""
    photograph = Image.fromarray(load_sample_image("flower.jpg")).resize((96, 96))
    return np.rint(np.asarray(photograph) / 255 * (90, 80, 70) + (70, 80, 60)).astype(np.uint8)


# 0 = brightness, 1 = contrast, 2 = saturation: the matrix must be right for every order of them.
ORDERS = list(itertools.permutations(range(3)))


def colour_matrix(factors: Any, lighting: Any, mean_rgb: NDArray[Any]) -> NDArray[np.float32]:
    matrix = np.full((3, 4), np.nan, np.float32)
    write_colour_matrix(matrix, np.array([*factors, *lighting], np.float32), mean_rgb.astype(np.float32))
    return matrix


def apply(matrix: NDArray[np.float32], image: NDArray[np.uint8]) -> NDArray[np.float64]:
    exact = matrix.astype(np.float64)
    return np.asarray(image @ exact[:, :3].T + exact[:, 3])


def mean_of(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.asarray(image.mean(axis=(0, 1), dtype=np.float64))


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_torchvisions_jitter_on_float_images(image, order, factors):
    expected = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    for step in order:
        expected = JITTER[step](expected, factors[step])
    assert 0.05 < expected.min() < expected.max() < 0.95, "nothing may clip here"
    lighting = np.array([3.5, -2.25, 6.0])
    got = apply(colour_matrix(factors, lighting, mean_of(image)), image)
    # torchvision's grey weights red by 0.2989, PIL's and ours by 0.299.
    assert np.abs(got - (expected.permute(1, 2, 0).numpy() * 255 + lighting)).max() < 0.02


@pytest.mark.parametrize("factors", [(0.9, 1.1, 0.93), (1.1, 0.9, 1.07), (0.9, 0.9, 0.9), (1.1, 1.1, 1.1)])
@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_torchvisions_jitter_on_pil_images_but_for_truncation(image, order, factors):
    """PIL truncates to uint8 after each of the three steps: by up to 1.1 each time, by half of that on average."""
    expected = Image.fromarray(image)
    for step in order:
        expected = JITTER[step](expected, factors[step])
    higher = apply(colour_matrix(factors, (0, 0, 0), mean_of(image)), image) - np.asarray(expected)
    assert higher.min() > -0.5 and higher.max() < 3.1
    assert 1.0 < higher.mean() < 1.65


def test_factors_of_one_give_exactly_the_identity():
    mean = np.array([123.4, 117.3, 104.9])
    np.testing.assert_array_equal(colour_matrix((1, 1, 1), (0, 0, 0), mean), np.eye(3, 4))


def test_lighting_is_added_last_and_unscaled():
    mean = np.array([100.0, 110.0, 120.0])
    with_lighting = colour_matrix((1.2, 0.8, 0.5), (4.0, -5.0, 6.0), mean)
    without = colour_matrix((1.2, 0.8, 0.5), (0, 0, 0), mean)
    np.testing.assert_array_equal(with_lighting[:, :3], without[:, :3])
    np.testing.assert_allclose(with_lighting[:, 3] - without[:, 3], (4, -5, 6), atol=1e-4)


def test_extreme_factors_reach_grey_and_black(image):
    grey = apply(colour_matrix((1, 1, 0), (0, 0, 0), mean_of(image)), image)
    np.testing.assert_allclose(grey, np.repeat(image @ [[0.299], [0.587], [0.114]], 3, axis=2), atol=1e-3)
    flat = apply(colour_matrix((1, 0, 1), (0, 0, 0), mean_of(image)), image)
    np.testing.assert_allclose(flat, np.full(image.shape, mean_of(image) @ [0.299, 0.587, 0.114]), atol=1e-3)
    assert np.abs(apply(colour_matrix((0, 1, 1), (0, 0, 0), mean_of(image)), image)).max() == 0


def test_warp_rounds_and_clips_the_colours_once(image):
    """The matrix brightens and turns so far that both ends clip."""
    matrix = colour_matrix((1.9, 1.8, 1.7), (20.0, -60.0, 5.0), mean_of(image))
    exact = apply(matrix, image)
    assert exact.min() < -10 and exact.max() > 265
    identity = torch.eye(2, 3).view(1, 1, 2, 3)
    got = warp(torch.from_numpy(image)[None], identity, torch.from_numpy(matrix)[None])[0, 0].numpy()
    np.testing.assert_allclose(got, np.clip(exact, 0, 255), atol=0.5 + 1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (224, 224), (600, 500)])
def test_mean_rgb(shape):
    image = np.random.Generator(np.random.Philox(0)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image[..., 1] //= 2
    mean = np.full(3, np.nan, np.float32)
    write_mean_rgb(mean, image)
    np.testing.assert_allclose(mean, mean_of(image), rtol=1e-6)


def test_mean_rgb_of_white():
    mean = np.zeros(3, np.float32)
    write_mean_rgb(mean, np.full((2000, 3000, 3), 255, np.uint8))
    np.testing.assert_array_equal(mean, 255)
