"""The CPU resize against PIL's, and against its own definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from fast_spatial.kernels.resize import resize_window

SIZES = [(427, 640), (224, 224), (100, 37), (31, 500), (1, 1), (2, 600), (640, 3)]


def photograph(height, width):
    return np.ascontiguousarray(load_sample_image("china.jpg")[:height, :width])


def enlarged(image, height, width):
    """A photograph, resized to a size."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def exact(image, height, width):
    """Weights fall linearly from each target pixel's centre, in float64: rows first, then columns."""

    def matrix(source, target):
        scale = source / target
        support = max(scale, 1.0)
        centres = (np.arange(target) + 0.5) * scale
        distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / support
        weights = np.maximum(1 - distance, 0)
        return weights / weights.sum(axis=1, keepdims=True)

    across = np.einsum("ts,hsc->htc", matrix(image.shape[1], width), image.astype(np.float64))
    return np.einsum("ts,swc->twc", matrix(image.shape[0], height), across)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("side", [224, 33, 7])
def test_it_is_pils_bilinear_within_one(height, width, side):
    image = enlarged(photograph(427, 640), height, width)
    got = np.empty((side, side, 3), np.uint8)
    resize_window(got, image, side, side, 0, 0)
    expected = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert np.abs(got - exact(image, side, side)).max() <= 1.1


@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_noise_is_no_worse(kind):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 200, 3)).astype(np.uint8) if kind == "noise" else None
    image = rng.integers(0, 2, (300, 200, 3)).astype(np.uint8) * 255 if image is None else image
    got = np.empty((128, 128, 3), np.uint8)
    resize_window(got, image, 128, 128, 0, 0)
    difference = got - exact(image, 128, 128)
    assert np.abs(difference).max() <= 1.1
    assert abs(difference.mean()) < 0.05  # ties go up, the rest goes either way


def test_a_window_is_cut_out_of_the_whole():
    image = photograph(300, 400)
    whole, window = np.empty((256, 256, 3), np.uint8), np.empty((224, 224, 3), np.uint8)
    resize_window(whole, image, 256, 256, 0, 0)
    resize_window(window, image, 256, 256, 9, 32)
    np.testing.assert_array_equal(window, whole[9:233, 32:256])


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_flat_areas_stay_as_they_are(value):
    image = np.full((173, 311, 3), value, np.uint8)
    got = np.empty((97, 97, 3), np.uint8)
    resize_window(got, image, 97, 97, 0, 0)
    assert (got == value).all()
