"""The draws: the generator against published vectors, the distributions against torchvision's."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, ColorJitter, RandomResizedCrop, Resize

from fast_spatial.kernels import sampling
from fast_spatial.kernels.layout import Colour, Geometry, Header, Setting
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import (
    EVALUATION,
    TRAINING,
    Augmentation,
    Views,
    draw_bits,
    draw_image,
    draw_matrices,
    epoch_order,
    pack_key,
    philox,
    uniform,
)

IMAGES = 20_000
DEGREES, TRANSLATE = 30.0, 3 / 28
LIMITS = SpatialLimits(DEGREES, TRANSLATE)
STANDARD = Augmentation(center=False, flip_prob=0.5, jitter=(0.1, 0.2, 0.3), lighting_std=0.05)
# Deterministic draws, so a claim that holds once holds always: how many standard errors are let pass.
SIGMAS = 4.0


class Draws(NamedTuple):
    """The outputs of `draw_image` for consecutive indices: [N, ...] arrays."""

    geometry: NDArray[np.int32]
    colour: NDArray[np.float32]
    matrices: NDArray[np.float32]


def draw(
    augmentation: Augmentation,
    *,
    count: int = IMAGES,
    shape: tuple[int, int] = (375, 500),
    side: int = 224,
    limits: NDArray[np.float64] | None = None,
    key: int = pack_key(TRAINING, 7),
    epoch: int = 2,
) -> Draws:
    if limits is None:
        limits = np.zeros((1, 2))
    geometry = np.zeros((count, len(Geometry)), np.int32)
    colour = np.zeros((count, len(Colour)), np.float32)
    matrices = np.zeros((count, len(limits), 2, 3), np.float32)
    header = np.zeros(len(Header), np.int64)
    header[Header.KEY], header[Header.EPOCH], header[Header.SIDE] = key, epoch, side
    shape_HWC = np.array([*shape, 3], np.int64)
    for index in range(count):
        header[Header.INDEX] = index
        draw_image(geometry[index], colour[index], matrices[index], header, shape_HWC, limits, augmentation.row())
    return Draws(geometry, colour, matrices)


def assert_same_distribution(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    """Means agree within SIGMAS standard errors, and so do the shares below each quantile of the reference."""
    error = math.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    assert abs(ours.mean() - theirs.mean()) <= SIGMAS * error
    for share in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        threshold = np.quantile(theirs, share)
        p, q = (ours <= threshold).mean(), (theirs <= threshold).mean()
        pooled = (p * len(ours) + q * len(theirs)) / (len(ours) + len(theirs))
        assert abs(p - q) <= SIGMAS * math.sqrt(pooled * (1 - pooled) * (1 / len(ours) + 1 / len(theirs))), share


def assert_uniform(values: NDArray[Any], low: float, high: float) -> None:
    """Mean, standard deviation and range of a uniform distribution."""
    half, count = (high - low) / 2, len(values)
    std = half / math.sqrt(3)
    assert abs(values.mean() - (low + high) / 2) <= SIGMAS * std / math.sqrt(count)
    assert abs(values.std() / std - 1) <= SIGMAS * math.sqrt(0.2 / count)
    slack = 1e-5 * half  # float32
    assert low - slack <= values.min() <= low + 0.02 * half
    assert high - 0.02 * half <= values.max() <= high + slack


def assert_equally_often(values: NDArray[Any], possible: int) -> None:
    counts = np.bincount(values, minlength=possible)
    assert len(counts) == possible
    expected = len(values) / possible
    assert np.abs(counts - expected).max() <= SIGMAS * math.sqrt(expected * (1 - 1 / possible))


# The generator


def philox_in_numpy(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 of [..., 4] counters and [2] keys, from the paper's definition."""
    c, (k0, k1) = [counter[..., i] for i in range(4)], [int(word) for word in key]
    for _ in range(10):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        mask, shift = np.uint64(2**32 - 1), np.uint64(32)
        c = [high >> shift ^ c[1] ^ np.uint64(k0), high & mask, low >> shift ^ c[3] ^ np.uint64(k1), low & mask]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, axis=-1)


def words(text: str) -> NDArray[np.uint64]:
    return np.array([int(word, 16) for word in text.split()], np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    np.testing.assert_array_equal(philox(*words(counter), *words(key)), words(expected))
    np.testing.assert_array_equal(philox_in_numpy(words(counter), words(key)), words(expected))


def test_no_two_quantities_share_a_draw():
    domains_and_seeds = [(d, s) for d in (TRAINING, EVALUATION) for s in (0, 1, 2**16, 2**31 - 1)]
    epochs, indices = (0, 1, 2, 110, 2**16, 2**31), (0, 1, 2, 3, 255, 2**16, 2**24, 1_281_166, 2**31, 2**32 - 1)
    streams, draws = range(6), (*range(64), 255, 256, 2**15, 2**16 - 1)
    seen = {
        int(draw_bits(pack_key(domain, seed), *where))
        for domain, seed in domains_and_seeds
        for where in itertools.product(epochs, indices, streams, draws)
    }
    assert len(seen) == 8 * 6 * 10 * 6 * 68 == 195_840


def test_streams_are_distinct():
    streams = [sampling.ORDER, sampling.CROP, sampling.FLIP, sampling.JITTER, sampling.LIGHTING, sampling.WARP]
    assert len(set(streams)) == 6


def test_uniform_numbers_fill_the_unit_interval():
    values = np.array([uniform(pack_key(TRAINING, 0), 0, index, 5, 1) for index in range(IMAGES)])
    assert_uniform(values, 0.0, 1.0)
    assert values.max() < 1.0
    assert len(np.unique(values)) == IMAGES


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40])
def test_pack_key_refuses_seeds_outside_its_bits(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}: must be between 0 and 2147483647"):
        pack_key(TRAINING, seed)


# The order of an epoch


@pytest.mark.parametrize(
    ("epoch", "sha256"),
    [
        (0, "f0861bbd9b9fea99e527141d9854a3ff8fe3c573f95d134d840af041ed6f40eb"),
        (3, "f073055745a1e6db44281a568fb7855abba2d72001ef127960a69c474be89512"),
    ],
)
def test_golden_order_of_an_epoch(epoch, sha256):
    """The hash is from `philox_in_numpy`, which is checked against published vectors."""
    order = epoch_order(pack_key(TRAINING, 0), epoch, 1000)
    counter = np.zeros((1000, 4), np.uint64)
    counter[:, 1], counter[:, 2] = epoch, np.arange(1000)
    bits = philox_in_numpy(counter, np.zeros(2, np.uint64))
    expected = np.argsort(bits[:, 0] << np.uint64(32) | bits[:, 1], kind="stable")
    np.testing.assert_array_equal(order, expected)
    assert order.dtype == np.int64
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == sha256


def test_orders_are_permutations_that_differ_by_epoch_seed_and_domain():
    orders = [
        epoch_order(pack_key(domain, seed), epoch, 5000)
        for domain in (TRAINING, EVALUATION)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(5000))
    for one, other in itertools.combinations([*orders, np.arange(5000)], 2):
        assert abs((one == other).sum() - 1) <= 6  # a Poisson number of mean 1
        assert abs(np.corrcoef(one, other)[0, 1]) <= SIGMAS / math.sqrt(5000)


# The crop


@pytest.fixture(scope="module")
def standard() -> Draws:
    return draw(STANDARD, limits=Views(3, LIMITS).rows())


@pytest.mark.parametrize("shape", [(375, 500), (500, 200)])
def test_crop_boxes_are_distributed_as_torchvisions(shape):
    box = draw(STANDARD, shape=shape).geometry.astype(float)
    image = torch.empty(1, *shape)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(IMAGES)], float)
    top, left, height, width = theirs.T
    assert_same_distribution(box[:, Geometry.BOX_H] * box[:, Geometry.BOX_W], height * width)
    assert_same_distribution(box[:, Geometry.BOX_W] / box[:, Geometry.BOX_H], width / height)
    assert_same_distribution(box[:, Geometry.BOX_Y], top)
    assert_same_distribution(box[:, Geometry.BOX_X], left)
    assert ((box[:, Geometry.BOX_Y] >= 0) & (box[:, Geometry.BOX_Y] + box[:, Geometry.BOX_H] <= shape[0])).all()
    assert ((box[:, Geometry.BOX_X] >= 0) & (box[:, Geometry.BOX_X] + box[:, Geometry.BOX_W] <= shape[1])).all()


def test_every_crop_position_is_equally_likely_both_ends_included():
    augmentation = Augmentation(center=False, scale=(0.81, 0.81), ratio=(1, 1))
    geometry = draw(augmentation, shape=(100, 100)).geometry
    assert (geometry[:, [Geometry.BOX_H, Geometry.BOX_W]] == 90).all()
    assert_equally_often(geometry[:, Geometry.BOX_Y], 11)
    assert_equally_often(geometry[:, Geometry.BOX_X], 11)
    assert_equally_often(geometry[:, Geometry.BOX_Y] * 11 + geometry[:, Geometry.BOX_X], 121)


@pytest.mark.parametrize("shape", [(30, 3000), (3000, 30), (37, 1001), (1001, 38), (1, 500), (500, 1), (64, 64)])
def test_where_no_try_fits_the_crop_is_torchvisions_central_one(shape):
    """An area of more than twice the image never fits. The narrow images also fail with the default areas."""
    for scale in [(0.08, 1.0)] * (min(shape) < 40) + [(2.0, 2.0)]:
        expected = RandomResizedCrop.get_params(torch.empty(1, *shape), list(scale), [3 / 4, 4 / 3])
        boxes = draw(Augmentation(center=False, scale=scale), shape=shape, count=20).geometry
        np.testing.assert_array_equal(
            boxes[:, [Geometry.BOX_Y, Geometry.BOX_X, Geometry.BOX_H, Geometry.BOX_W]], np.tile(expected, (20, 1))
        )


def test_random_crops_are_resized_to_the_side_and_kept_whole(standard):
    for column, value in {
        Geometry.RESIZED_H: 224,
        Geometry.RESIZED_W: 224,
        Geometry.CROP_Y: 0,
        Geometry.CROP_X: 0,
        Geometry.CROP_H: 224,
        Geometry.CROP_W: 224,
    }.items():
        assert (standard.geometry[:, column] == value).all()


def test_center_geometry_is_torchvisions_resize_and_center_crop():
    """The crop of an image of coordinates shows where it begins."""
    rng = np.random.Generator(np.random.Philox(3))
    shapes = [(256, 256), (257, 256), (256, 257), (375, 500), (500, 375), (427, 301), (50, 60), (20, 333)]
    shapes += [(int(h), int(w)) for h, w in rng.integers(30, 700, (60, 2))]
    for height, width in shapes:
        got = draw(Augmentation(center=True), shape=(height, width), count=1).geometry[0]
        resized = Resize(256)(Image.new("L", (width, height)))
        y, x = torch.meshgrid(torch.arange(resized.height), torch.arange(resized.width), indexing="ij")
        corner = CenterCrop(224)(torch.stack([y, x]))
        assert (got[Geometry.RESIZED_H], got[Geometry.RESIZED_W]) == (resized.height, resized.width)
        assert (got[Geometry.CROP_Y], got[Geometry.CROP_X]) == tuple(corner[:, 0, 0].tolist()), (height, width)
        assert tuple(got[[Geometry.BOX_Y, Geometry.BOX_X, Geometry.BOX_H, Geometry.BOX_W]]) == (0, 0, height, width)
        assert tuple(got[[Geometry.CROP_H, Geometry.CROP_W]]) == (224, 224)


def test_center_geometry_scales_with_the_side():
    for side, short in ((32, 37), (64, 73), (112, 128), (224, 256), (448, 512)):
        got = draw(Augmentation(center=True), shape=(300, 300), side=side, count=1).geometry[0]
        assert tuple(got[[Geometry.RESIZED_H, Geometry.RESIZED_W, Geometry.CROP_H, Geometry.CROP_W]]) == (
            short,
            short,
            side,
            side,
        )


# Flip, colours


@pytest.mark.parametrize("flip_prob", [0.0, 0.3, 0.5, 1.0])
def test_flip_rate(flip_prob):
    matrices = draw(Augmentation(center=False, flip_prob=flip_prob)).matrices
    flipped = np.linalg.det(matrices[:, 0, :, :2].astype(float)) < 0
    assert abs(flipped.mean() - flip_prob) <= SIGMAS * math.sqrt(flip_prob * (1 - flip_prob) / IMAGES)


def test_all_views_of_an_image_are_flipped_alike(standard):
    flipped = np.linalg.det(standard.matrices[..., :2].astype(float)) < 0
    assert (flipped == flipped[:, :1]).all()


def test_jitter_factors_are_distributed_as_torchvisions(standard):
    torch.manual_seed(1)
    jitter = ColorJitter(0.1, 0.2, 0.3)
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.9, 1.1), (0.8, 1.2), (0.7, 1.3))
    ranges = [list(r) for r in (jitter.brightness, jitter.contrast, jitter.saturation)]
    theirs = np.array([ColorJitter.get_params(*ranges, None)[1:4] for _ in range(IMAGES)], float)
    for factor in range(3):
        ours = standard.colour[:, factor].astype(float)
        assert_uniform(ours, *ranges[factor])
        assert_same_distribution(ours, theirs[:, factor])


def test_jitter_factors_never_fall_below_zero():
    colour = draw(Augmentation(center=False, jitter=(1.5, 0, 0)), count=5000).colour
    assert_uniform(colour[:, 0].astype(float), 0.0, 2.5)
    assert (colour[:, 1:3] == 1.0).all()


def test_lighting_has_the_published_covariance(standard):
    values = np.diag([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = (255 * 0.05) ** 2 * vectors @ values**2 @ vectors.T
    offsets = standard.colour[:, Colour.LIGHTING_RED : Colour.LIGHTING_BLUE + 1].astype(float)
    variances = np.diag(expected)
    assert (np.abs(offsets.mean(axis=0)) <= SIGMAS * np.sqrt(variances / IMAGES)).all()
    error = np.sqrt((np.outer(variances, variances) + expected**2) / IMAGES)
    assert (np.abs(np.cov(offsets.T) - expected) <= SIGMAS * error).all()
    # Along each principal component the offsets are normal, not only of the right variance.
    for component, value in enumerate(np.diag(values)):
        scaled = offsets @ np.linalg.inv(vectors).T[:, component] / (255 * 0.05 * value)
        for threshold, share in ((0.5, 0.382925), (1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
            within = (np.abs(scaled) < threshold).mean()
            assert abs(within - share) <= SIGMAS * math.sqrt(share * (1 - share) / IMAGES)


def test_no_lighting_and_no_jitter_leave_the_colours():
    colour = draw(Augmentation(center=False), count=100).colour
    np.testing.assert_array_equal(colour, np.tile([1, 1, 1, 0, 0, 0], (100, 1)))


# The views


def angles_and_translations(matrices: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """(degrees, tx, ty), [..., 3], of unflipped matrices, by the convention's definition."""
    exact = matrices.astype(np.float64)
    centre = np.full(2, (side - 1) / 2)
    translation = (exact[..., 2] + exact[..., :2] @ centre - centre) / (side - 1)
    angle = np.rad2deg(np.arctan2(exact[..., 1, 0], exact[..., 0, 0]))
    return np.concatenate([angle[..., None], translation], axis=-1)


@pytest.fixture(scope="module")
def view_params() -> NDArray[np.float64]:
    """(degrees, tx, ty) of the identity view and four random views: [N, 5, 3]."""
    augmentation = Augmentation(center=True)
    limits = Views(4, LIMITS).rows()
    return angles_and_translations(draw(augmentation, limits=limits).matrices, 224)


def test_rotations_and_translations_are_uniform_within_the_limits(view_params):
    for view in range(1, 5):
        for column, limit in enumerate((DEGREES, TRANSLATE, TRANSLATE)):
            assert_uniform(view_params[:, view, column], -limit, limit)


def test_views_angles_and_translations_are_independent(view_params):
    columns = view_params[:, 1:].reshape(IMAGES, 12)
    correlations = np.corrcoef(columns.T) - np.eye(12)
    assert np.abs(correlations).max() <= SIGMAS / math.sqrt(IMAGES)
    neighbours = np.corrcoef(columns[1:].T, columns[:-1].T)[:12, 12:]
    assert np.abs(neighbours).max() <= (SIGMAS + 0.5) / math.sqrt(IMAGES)


def test_other_epochs_seeds_and_domains_draw_other_views():
    views, indices = Views(1, LIMITS, untouched_first=False), np.arange(2000)
    keys = [pack_key(TRAINING, 0), pack_key(TRAINING, 1), pack_key(EVALUATION, 0)]
    sets = [draw_matrices(key, epoch, indices, views, 224) for key in keys for epoch in (0, 1)]
    for one, other in itertools.combinations(sets, 2):
        angles, others = (angles_and_translations(each, 224)[:, 0, 0] for each in (one, other))
        assert abs(np.corrcoef(angles, others)[0, 1]) <= SIGMAS / math.sqrt(2000)


def test_limits_of_zero_leave_the_view_exactly_untouched():
    augmentation = Augmentation(center=False, jitter=(0.1, 0.1, 0.1), lighting_std=0.05)
    limits = np.array([(0, 0), (DEGREES, TRANSLATE), (0, 0)], np.float64)
    for side in (32, 33, 224):
        matrices = draw(augmentation, limits=limits, side=side, count=200).matrices
        for view in (0, 2):
            np.testing.assert_array_equal(matrices[:, view], np.tile(np.eye(2, 3), (200, 1, 1)))
        assert (matrices[:, 1] != np.eye(2, 3)).any(axis=(1, 2)).all()


def test_one_limit_alone():
    limits = np.array([(DEGREES, 0), (0, TRANSLATE)], np.float64)
    params = angles_and_translations(draw(Augmentation(center=True), limits=limits, count=2000).matrices, 224)
    assert np.abs(params[:, 0, 1:]).max() < 1e-6
    assert np.abs(params[:, 1, 0]).max() == 0
    assert np.abs(params[:, 0, 0]).min() > 0
    assert np.abs(params[:, 1, 1:]).min() > 0


def test_draw_matrices_are_those_of_draw_image():
    views = Views(10, SpatialLimits(40, 4 / 28))
    key = pack_key(EVALUATION, 3)
    draws = draw(Augmentation(center=True), limits=views.rows(), side=64, count=300, key=key, epoch=5)
    indices = np.array([299, 0, 17, 18, 5])
    np.testing.assert_array_equal(draw_matrices(key, 5, indices, views, 64), draws.matrices[indices])


def test_the_untouched_view_comes_first():
    limits = SpatialLimits(30, 0.1)
    np.testing.assert_array_equal(Views(2, limits).rows(), [(0, 0), (30, 0.1), (30, 0.1)])
    np.testing.assert_array_equal(Views(1, limits, untouched_first=False).rows(), [(30, 0.1)])
    for views in (Views(0), Views(2, limits), Views(1, limits, untouched_first=False)):
        assert views.rows().shape == (len(views), 2) and views.rows().dtype == np.float64


# The columns


def test_each_value_of_an_augmentation_has_its_column():
    row = Augmentation(True, (0.2, 0.9), (0.5, 2.0), 0.25, (0.1, 0.3, 0.4), 0.05).row()
    assert row.dtype == np.float64
    assert {column.name: float(row[column]) for column in Setting} == {
        "CENTER": 1.0,
        "SCALE_MIN": 0.2,
        "SCALE_MAX": 0.9,
        "RATIO_MIN": 0.5,
        "RATIO_MAX": 2.0,
        "FLIP_PROB": 0.25,
        "BRIGHTNESS": 0.1,
        "CONTRAST": 0.3,
        "SATURATION": 0.4,
        "LIGHTING_STD": 0.05,
    }


@pytest.mark.parametrize("columns", [Header, Setting, Geometry, Colour])
def test_columns_are_numbered_without_gaps(columns):
    assert [int(column) for column in columns] == list(range(len(columns)))
