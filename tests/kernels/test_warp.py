"""The warp: every backend is compared with the convention in float64, and the convention with a golden file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn.functional import affine_grid, grid_sample

from fast_spatial.kernels.limits import GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.spatial import GRID_IDENTITY, grid, matrices, write_matrix
from fast_spatial.kernels.warp import warp, warp_reference
from fast_spatial.kernels.warp_cpu import warp_image
from fast_spatial.pipelines import ops

# B images, V views, S side, C = 3 channels.
VIEWS = 6
SIDES = (32, 33, 64, 97, 224)
LIMITS = {"30deg-24px": (30.0, 3 / 28), "40deg-32px": (40.0, 4 / 28)}
IDENTITY_34 = np.eye(3, 4, dtype=np.float32)
GOLDEN = Path(__file__).parents[1] / "golden" / "warp_golden.npz"

# At most this far from the float64 value, and at least this share of the values rounded as it is. The exact backends
# return values before rounding; DALI's own warp has coarser coordinates.
MAX_ERROR = {"numba": 0.6, "reference-float64": 1e-9, "reference-float32": 0.05, "dali": 1.5}
MIN_SHARE = {"numba": 0.98, "reference-float64": 0.9999, "reference-float32": 0.98, "dali": 0.96}


def exact_warp(image_SSC: NDArray[Any], degrees: float, tx: float, ty: float) -> NDArray[np.float64]:
    """One view, float64 of 255: source = R(a) (target - c) + c + (S - 1) t, bilinear, black outside."""
    side = len(image_SSC)
    centre, angle = (side - 1) / 2, np.deg2rad(degrees)
    y, x = np.mgrid[:side, :side].astype(np.float64) - centre
    source_x = np.cos(angle) * x - np.sin(angle) * y + centre + (side - 1) * tx
    source_y = np.sin(angle) * x + np.cos(angle) * y + centre + (side - 1) * ty
    return bilinear(image_SSC, source_x, source_y)


def bilinear(image_SSC: NDArray[Any], source_x: NDArray[np.float64], source_y: NDArray[np.float64]) -> NDArray[Any]:
    last = len(image_SSC) - 1
    view = np.zeros((*source_x.shape, 3))
    for row in (np.floor(source_y), np.floor(source_y) + 1):
        for column in (np.floor(source_x), np.floor(source_x) + 1):
            inside = (row >= 0) & (row <= last) & (column >= 0) & (column <= last)
            weight = inside * (1 - np.abs(source_x - column)) * (1 - np.abs(source_y - row))
            pixels = image_SSC[np.clip(row, 0, last).astype(int), np.clip(column, 0, last).astype(int)]
            view += weight[..., None] * pixels
    return view


def exact_views(images_BSSC: NDArray[Any], params_V3: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([[exact_warp(image, *params) for params in params_V3] for image in images_BSSC])


def matrix_float64(params: NDArray[np.float64], side: int, flip: bool = False) -> NDArray[np.float64]:
    out = np.empty((2, 3))
    write_matrix(out, *params.tolist(), side, flip)
    return out


def photographs(side: int) -> NDArray[np.uint8]:
    square = (100, 0, 527, 427)
    resample = Image.Resampling.BILINEAR
    return np.stack(
        [
            np.asarray(Image.fromarray(image).crop(square).resize((side, side), resample))
            for image in load_sample_images().images
        ]
    )


def four_images(side: int) -> NDArray[np.uint8]:
    """Two photographs, uniform noise, and noise of 0 and 255."""
    rng = np.random.Generator(np.random.Philox(side))
    uniform = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    extreme = rng.choice(np.array([0, 255], np.uint8), (side, side, 3))
    return np.concatenate([photographs(side), uniform[None], extreme[None]])


def some_params(degrees: float, translate: float) -> NDArray[np.float64]:
    """Both corners of the limits and four views inside: [6, 3] of (degrees, tx, ty)."""
    inside = np.random.Generator(np.random.Philox(1)).uniform(-1, 1, (VIEWS - 2, 3))
    return np.concatenate([[(1, 1, 1), (-1, 1, -1)], inside]) * (degrees, translate, translate)


@pytest.fixture(scope="module")
def dali_warp():
    """DALI's path: (images, float32 matrices, colour numbers) -> views, with everything in host memory."""

    @pipeline_def(num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        images = fn.external_source(name="images", layout="HWC")
        return ops.dali_views(images, fn.external_source(name="matrices"), fn.external_source(name="colour"), VIEWS)

    pipeline = graph(batch_size=4)

    def run(images_BSSC, matrices_BV23, colour_B7=None):
        if colour_B7 is None:
            colour_B7 = np.tile(np.array([1, 1, 1, 0, 0, 0, 0], np.float32), (len(images_BSSC), 1))
        pipeline.feed_input("images", list(images_BSSC), layout="HWC")
        pipeline.feed_input("matrices", list(matrices_BV23))
        pipeline.feed_input("colour", list(colour_B7))
        (views,) = pipeline.run()
        return np.stack([np.array(views[b]) for b in range(len(images_BSSC))])

    return run


@pytest.fixture(scope="module")
def backends(dali_warp):
    """Every backend that runs on a CPU, as (images, params [V, 3]) -> views."""

    def tensors(images_BSSC: Any, params_V3: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.broadcast_to(params_V3, (len(images_BSSC), *params_V3.shape))
        return torch.from_numpy(images_BSSC), torch.from_numpy(matrices(rows, images_BSSC.shape[1]))

    def in_float64(images_BSSC, params_V3):
        rows = np.stack([matrix_float64(params, images_BSSC.shape[1]) for params in params_V3])
        repeated = torch.from_numpy(np.tile(rows, (len(images_BSSC), 1, 1, 1)))
        return warp_reference(torch.from_numpy(images_BSSC), repeated)

    def by_dali(images_BSSC, params_V3):
        return dali_warp(images_BSSC, tensors(images_BSSC, params_V3)[1].numpy())

    by_backend = {
        "numba": lambda images, params: warp(*tensors(images, params)),
        "reference-float64": in_float64,
        "reference-float32": lambda images, params: warp_reference(*tensors(images, params)),
        "dali": by_dali,
    }
    return {name: lambda *args, run=run: np.asarray(run(*args), np.float64) for name, run in by_backend.items()}


BACKENDS = tuple(MAX_ERROR)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("side", SIDES)
def test_backends_agree_with_float64(backends, side, limits):
    images, params = four_images(side), some_params(*LIMITS[limits])
    exact = exact_views(images, params)
    for name, run in backends.items():
        views = run(images, params)
        assert views.shape == (4, VIEWS, side, side, 3)
        assert np.abs(views - exact).max() <= MAX_ERROR[name], name
        share = (np.rint(views) == np.rint(exact)).mean(axis=(1, 2, 3, 4))
        assert share.min() >= MIN_SHARE[name], f"{name}: {share} on two photographs, noise and 0/255 noise"


@pytest.mark.parametrize("name", BACKENDS)
def test_identity_is_exact(backends, name):
    for side in (32, 33, 224):
        images = four_images(side)
        views = backends[name](images, np.zeros((VIEWS, 3)))
        np.testing.assert_array_equal(np.rint(views), np.repeat(images[:, None], VIEWS, axis=1))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("side", [32, 33])
def test_positive_angle_turns_counter_clockwise(backends, side, name):
    images = four_images(side)
    views = backends[name](images, np.array([(90, 0, 0), (-90, 0, 0), (180, 0, 0)] * 2, np.float64))
    for image, (plus, minus, half, *_) in zip(images, np.rint(views)):
        np.testing.assert_array_equal(plus, np.rot90(image, 1))
        np.testing.assert_array_equal(minus, np.rot90(image, -1))
        np.testing.assert_array_equal(half, np.rot90(image, 2))


@pytest.mark.parametrize("name", BACKENDS)
def test_positive_translation_moves_left_and_up(backends, name):
    side, px, py = 33, 5, 3
    tx, ty = px / (side - 1), py / (side - 1)
    images = four_images(side)
    params = np.array([(0, tx, 0), (0, -tx, 0), (0, 0, ty), (0, 0, -ty), (0, tx, ty), (0, ty, tx)])
    views = np.rint(backends[name](images, params))

    def moved_left_up(x: int, y: int) -> NDArray[np.uint8]:
        black = np.pad(images, ((0, 0), (side, side), (side, side), (0, 0)))
        return black[:, side + y : 2 * side + y, side + x : 2 * side + x]

    for view, (x, y) in enumerate([(px, 0), (-px, 0), (0, py), (0, -py), (px, py), (py, px)]):
        np.testing.assert_array_equal(views[:, view], moved_left_up(x, y), err_msg=f"moved by {x}, {y}")


@pytest.mark.parametrize("name", BACKENDS)
def test_golden_views(backends, name):
    golden = np.load(GOLDEN)
    views = backends[name](golden["images"], golden["params"])
    assert np.abs(views - golden["views"] / 256).max() <= MAX_ERROR[name] + 1 / 512


def test_golden_views_are_grid_sample_with_aligned_corners():
    golden = np.load(GOLDEN)
    images = torch.from_numpy(golden["images"]).double().permute(0, 3, 1, 2)
    errors = {}
    for align_corners in (True, False):
        worst = 0.0
        for view, (degrees, tx, ty) in enumerate(golden["params"]):
            cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
            theta = torch.tensor([[cos, -sin, 2 * tx], [sin, cos, 2 * ty]], dtype=torch.float64).expand(2, 2, 3)
            locations = affine_grid(theta, list(images.shape), align_corners=align_corners)
            warped = grid_sample(images, locations, padding_mode="zeros", align_corners=align_corners)
            expected = golden["views"][:, view] / 256
            worst = max(worst, np.abs(warped.permute(0, 2, 3, 1).numpy() - expected)[0].max())
        errors[align_corners] = worst
    assert errors[True] <= 1 / 500
    assert errors[False] > 10, "on the photograph"


def test_float64_of_this_file_agrees_with_golden():
    golden = np.load(GOLDEN)
    np.testing.assert_allclose(exact_views(golden["images"], golden["params"]), golden["views"] / 256, atol=1 / 500)


def test_flip_in_the_matrix_flips_the_image_first(dali_warp):
    side = 33
    images, params = four_images(side), some_params(30, 3 / 28)
    rows = np.tile([matrix_float64(row, side, flip=True) for row in params], (len(images), 1, 1, 1))
    expected = exact_views(images[:, :, ::-1], params)
    tensor, float32 = torch.from_numpy(images), rows.astype(np.float32)
    np.testing.assert_allclose(warp_reference(tensor, torch.from_numpy(rows)).numpy(), expected, atol=1e-9)
    assert np.abs(warp(tensor, torch.from_numpy(float32)).numpy() - expected).max() <= MAX_ERROR["numba"]
    assert np.abs(dali_warp(images, float32) - expected).max() <= MAX_ERROR["dali"]


def test_colour_changes_before_the_warp_and_outside_stays_black(dali_warp):
    side = 64
    images = four_images(side)
    params = np.array([(0, 0.5, 0), (45, 0, 0), (30, 3 / 28, 3 / 28), (0, 0, -0.25), (-40, 0, 0), (0, 0, 0)], float)
    numbers = np.tile(np.array([0.9, 1, 1, 50, 60, 70], np.float32), (len(images), 1))
    colour = np.tile(np.array([[0.9, 0, 0, 50], [0, 0.9, 0, 60], [0, 0, 0.9, 70]], np.float32), (len(images), 1, 1))
    recoloured = np.floor(np.clip(0.9 * images.astype(np.float64) + (50, 60, 70), 0, 255) + 0.5)
    expected = exact_views(recoloured, params)
    outside = exact_views(np.ones_like(images), params) == 0
    assert 0.1 < outside.mean() < 0.3

    rows = matrices(np.broadcast_to(params, (len(images), *params.shape)), side)
    tensors = torch.from_numpy(images), torch.from_numpy(rows), torch.from_numpy(colour)
    views = {
        "numba": warp(*tensors).numpy(),
        "reference-float32": warp_reference(*tensors).numpy(),
        "dali": dali_warp(images, rows, numbers),
    }
    for name, got in views.items():
        assert np.abs(got - expected).max() <= MAX_ERROR[name], name
        if name != "reference-float32":
            assert got[outside].max() == 0, name


def test_warp_stays_inside_its_buffers_and_finds_black_outside():
    """Scratch and views lie inside poisoned memory: a read outside would brighten a pixel, a write would show."""
    side, guard = 17, 4000
    rng = np.random.Generator(np.random.Philox(2))
    image = rng.integers(200, 256, (side, side, 3), dtype=np.uint8)
    params = rng.uniform(-1, 1, (300, 3)) * (180, 1, 1)
    corners = np.array([(a, x, y) for a in (0, 90, 180, -180) for x in (-1, 0, 1) for y in (-1, 0, 1)], float)
    params = np.concatenate([params, corners])
    rows = matrices(params, side)

    packed = np.full((side + 2) ** 2 + 2 * guard, -1, np.int32)
    scratch = packed[guard:-guard].reshape(side + 2, side + 2)
    written = np.full(rows.shape[0] * side * side * 3 + 2 * guard, 77, np.uint8)
    views = written[guard:-guard].reshape(-1, side, side, 3)
    warp_image(views, scratch, image, rows, IDENTITY_34)
    assert np.abs(views - exact_views(image[None], params)[0]).max() <= MAX_ERROR["numba"]

    far = rows.copy()
    far[:, :, 2] += np.where(np.arange(len(far)) % 2, 1e6, -1e6)[:, None]
    far[::3, :, :2] *= 1000
    warp_image(views, scratch, image, far, IDENTITY_34)
    assert views.max() == 0
    for fence in (packed[:guard], packed[-guard:]):
        assert (fence == -1).all()
    for fence in (written[:guard], written[-guard:]):
        assert (fence == 77).all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8, 9, 3), (2, 1, 2, 3), None), "images are"),
        (((2, 8, 8, 1), (2, 1, 2, 3), None), "images are"),
        (((2, 8, 8, 3), (3, 1, 2, 3), None), "matrices have shape"),
        (((2, 8, 8, 3), (2, 1, 3, 3), None), "matrices have shape"),
        (((2, 8, 8, 3), (2, 1, 2, 3), (1, 3, 4)), "colour has shape"),
    ],
)
def test_wrong_shapes_are_refused(shapes, message):
    images, rows, colour = shapes
    with pytest.raises(ValueError, match=message):
        warp(
            torch.zeros(images, dtype=torch.uint8),
            torch.zeros(rows),
            None if colour is None else torch.zeros(colour),
        )


def test_images_must_be_uint8():
    with pytest.raises(ValueError, match=r"images are torch\.float32"):
        warp(torch.zeros(1, 8, 8, 3), torch.zeros(1, 1, 2, 3))


def test_grid_has_31_by_5_by_5_evenly_spaced_views_with_their_ends():
    rows = grid(SpatialLimits(30, 3 / 28))
    assert rows.shape == (775, 3) == (GRID_VIEWS, 3)
    assert len(np.unique(rows, axis=0)) == 775
    np.testing.assert_array_equal(rows[GRID_IDENTITY], (0, 0, 0))
    angles, shifts_x, shifts_y = (np.unique(rows[:, column]) for column in range(3))
    np.testing.assert_allclose(angles, np.arange(-30, 31, 2), atol=1e-12)
    for shifts in (shifts_x, shifts_y):
        np.testing.assert_allclose(shifts, np.array([-24, -12, 0, 12, 24]) / 224, atol=1e-15)
    assert {(30, 3 / 28, -3 / 28), (-30, -3 / 28, 3 / 28)} <= {tuple(row) for row in rows}


def test_grid_of_no_limits_is_the_identity():
    np.testing.assert_array_equal(matrices(grid(SpatialLimits(0, 0)), 32), np.tile(np.eye(2, 3), (775, 1, 1)))


def test_published_limits():
    for degrees, px in ((30, 24), (40, 32)):
        limits = SpatialLimits.from_px(degrees)
        assert limits.translate_px == pytest.approx(px)
        assert limits.translate == pytest.approx(SpatialLimits.from_px(degrees, px).translate)
    assert SpatialLimits.from_px(10, 56).translate == 0.25


@pytest.mark.parametrize(
    ("degrees", "translate", "named"),
    [
        (-1, 0.1, "degrees is -1"),
        (181, 0.1, "degrees is 181"),
        (30, -0.1, "translate is -0.1"),
        (30, 1.5, "translate is 1.5"),
        (float("nan"), 0.1, "degrees is nan"),
        (30, float("nan"), "translate is nan"),
    ],
)
def test_impossible_limits_are_refused(degrees, translate, named):
    with pytest.raises(ValueError, match=named):
        SpatialLimits(degrees, translate)


def test_params_need_three_columns():
    with pytest.raises(ValueError, match="last axis"):
        matrices(np.zeros((4, 2)), 32)
