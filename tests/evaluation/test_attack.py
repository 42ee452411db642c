"""Attacks against planted models whose verdict on every view is known beforehand."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fast_spatial.evaluation.attack import GridSurvivors, losses_of, take_views, verdicts, worst_view
from fast_spatial.evaluation.forward import BatchedForward, Judge, ModuleJudge, even_pass, largest_pass
from fast_spatial.evaluation.verdicts import ImageVerdict, add_grid, judge_grid, judge_images, summarize
from fast_spatial.kernels.limits import GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.sampling import EVALUATION, Views, draw_matrices, pack_key
from fast_spatial.kernels.spatial import GRID_IDENTITY, grid, matrices
from fast_spatial.kernels.warp import warp
from fast_spatial.pipelines.loader import Batch

LIMITS = SpatialLimits.from_px(30)


class FunctionJudge(Judge):
    """A judge that is a function of the views."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def inputs(self, views_NSSC: Tensor) -> Tensor:
        return views_NSSC

    def logits(self, inputs: Tensor) -> Tensor:
        return self._function(inputs)


def planted(losses_BV: Tensor):
    """Views that carry their own (image, view) in their pixels, and a judge that gives each the loss planted for it."""
    B, V = losses_BV.shape
    views = torch.zeros(B, V, 2, 2, 3, dtype=torch.uint8)
    views[..., 0] = torch.arange(B)[:, None, None, None]
    views[..., 1] = torch.arange(V)[None, :, None, None]
    calls = []

    def judge(views_NSSC: Tensor) -> Tensor:
        calls.append(len(views_NSSC))
        image, view = views_NSSC[:, 0, 0, 0].long(), views_NSSC[:, 0, 0, 1].long()
        # Two classes, label 0: a loss of log(1 + exp(m)) for the margin m.
        margin = torch.log(torch.expm1(losses_BV[image, view]))
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    return views, FunctionJudge(judge), calls


@pytest.mark.parametrize("k", range(1, 21))
def test_the_view_of_highest_loss_is_picked(k):
    generator = torch.Generator().manual_seed(k)
    losses = torch.rand(6, k + 1, generator=generator) + 0.1
    views, judge, _ = planted(losses)
    labels = torch.zeros(6, dtype=torch.long)
    for chunk in (0, 1, 5, 1000):
        logits = BatchedForward(judge, chunk)(views)
        torch.testing.assert_close(losses_of(logits, labels), losses)
        choice = worst_view(losses_of(logits, labels))
        assert choice.tolist() == losses.numpy().argmax(axis=1).tolist()
        assert take_views(views, choice)[:, 0, 0, 1].tolist() == choice.tolist()


def test_the_first_of_equal_losses_wins_and_not_a_number_is_the_worst():
    losses = torch.tensor([[1.0, 3.0, 3.0, 2.0], [2.0, 2.0, 2.0, 2.0], [1.0, 0.5, float("nan"), 9.0]])
    logits = torch.zeros(3, 4, 2)
    logits[..., 1] = torch.log(torch.expm1(losses))
    assert worst_view(losses_of(logits, torch.zeros(3, dtype=torch.long))).tolist() == [1, 0, 2]


def test_padded_passes_have_one_shape_and_change_nothing():
    losses = torch.rand(7, 3) + 0.1
    views, judge, calls = planted(losses)
    padded = BatchedForward(judge, 8, pad=True)(views)
    assert calls == [8, 8, 8]
    torch.testing.assert_close(padded, BatchedForward(judge, 0)(views), rtol=0, atol=0)


def test_padded_passes_have_one_layout_in_memory():
    """It decides how a convolution is computed, and so how its result is rounded."""
    strides = []

    class Layouts(FunctionJudge):
        def inputs(self, views_NSSC):
            return views_NSSC.permute(0, 3, 1, 2).float()

    def look(inputs):
        strides.append(inputs.stride())
        return inputs.flatten(1)

    judge = Layouts(look)
    BatchedForward(judge, 4, pad=True)(torch.zeros(3, 2, 5, 5, 3, dtype=torch.uint8))
    assert len(strides) == 2
    assert len(set(strides)) == 1


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "no convolution engine"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), "no convolution engine"),
    ],
)
def test_passes_that_are_too_large_are_halved_and_stay_so(caplog, pad, error, told):
    losses = torch.rand(5, 4) + 0.1
    views, judge, calls = planted(losses)

    def small(inputs):
        if len(inputs) > 6:
            raise error
        return judge(inputs)

    passes = BatchedForward(FunctionJudge(small), 0, pad=pad)
    with caplog.at_level(logging.WARNING):
        found = [passes(views), passes(views)]
    assert calls == [5, 5, 5, 5] * 2
    for logits in found:
        torch.testing.assert_close(logits, BatchedForward(judge, 0)(views), rtol=0, atol=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{told} in a forward pass over {failed} views; continuing with {failed // 2} views" for failed in (20, 10)
    ]

    def never(inputs):
        raise error

    with pytest.raises(type(error), match=str(error)):
        BatchedForward(FunctionJudge(never), 0, pad=pad)(views)


def test_other_errors_of_a_pass_are_no_reason_to_halve_it():
    def broken(inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    passes = BatchedForward(FunctionJudge(broken), 0)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        passes(torch.zeros(2, 2, 5, 5, 3, dtype=torch.uint8))
    assert passes.size == 0


@pytest.mark.parametrize(
    ("count", "largest", "size"), [(2816, 2674, 1408), (2674, 2674, 2674), (2675, 2674, 1338), (7, 3, 3)]
)
def test_passes_are_the_fewest_even_ones(count, largest, size):
    assert even_pass(count, largest) == size


def test_no_activation_of_a_resnet_passes_two_to_the_thirty_one():
    assert largest_pass(224) == 2674
    for side in (64, 160, 224, 480):
        assert largest_pass(side) * 64 * (side // 2) ** 2 < 1 << 31 <= (largest_pass(side) + 1) * 64 * (side // 2) ** 2


@pytest.mark.parametrize("side", [0, 4])
def test_passes_without_a_size_keep_to_the_largest(monkeypatch, side):
    asked = []

    def largest(side):
        asked.append(side)
        return 6

    monkeypatch.setattr("fast_spatial.evaluation.forward.largest_pass", largest)
    views, judge, calls = planted(torch.rand(5, 4) + 0.1)
    shape = views.shape[2]
    BatchedForward(judge, 0, side=side)(views)
    assert calls == [5, 5, 5, 5]
    assert asked == [side or shape]


@pytest.mark.parametrize("size", [0, 4, 7, 12])
def test_warps_are_judged_alike_in_any_number_of_passes(size):
    images = torch.randint(0, 256, (4, 9, 9, 3), dtype=torch.uint8)
    rows = torch.from_numpy(matrices(np.random.default_rng(0).uniform(-1, 1, (4, 3, 3)) * [30, 0.1, 0.1], 9))
    judge = FunctionJudge(lambda views: views.flatten(1).float())
    expected = warp(images, rows).flatten(2).float()
    for pad in (False, True):
        torch.testing.assert_close(BatchedForward(judge, size, pad=pad).warped(images, rows), expected, rtol=0, atol=0)


def test_views_are_shrunk_as_a_mean_of_their_pixels():
    views = torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    seen = []

    def look(small):
        seen.append(small)
        return small.flatten(1).float()

    judge = FunctionJudge(look)
    BatchedForward(judge, 0, side=8)(views)
    assert seen[0].dtype == torch.uint8
    assert seen[0].shape == (6, 8, 8, 3)
    assert (seen[0].float().mean((1, 2)) - views.flatten(0, 1).float().mean((1, 2))).abs().max() < 3
    flat = torch.full((1, 1, 16, 16, 3), 77, dtype=torch.uint8)
    BatchedForward(judge, 0, side=5)(flat)
    assert (seen[1] == 77).all()


def test_verdicts_follow_the_original_definition():
    # Columns: untouched, first random view, second; a loss above log 2 = 0.69 is a wrong answer.
    losses = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.9, 0.3], [0.9, 0.1, 0.1], [0.1, 0.2, 0.8]])
    views, judge, _ = planted(losses)
    found = verdicts(BatchedForward(judge, 0)(views), torch.zeros(4, dtype=torch.long))
    assert found.natural.tolist() == [True, True, False, True]
    assert found.random.tolist() == [True, False, True, True]
    assert found.worst.tolist() == [True, False, False, False]
    assert found.all_views.tolist() == [True, False, False, False]
    torch.testing.assert_close(found.natural_loss, losses[:, 0])


def test_with_many_classes_the_worst_view_can_be_right_while_another_is_wrong():
    # View 1 has the higher loss but is right (many classes share the rest); view 0 is wrong by a hair.
    logits = torch.full((1, 2, 100), -10.0)
    logits[0, 0, :2] = torch.tensor([0.0, 0.001])
    logits[0, 1] = 0.0
    logits[0, 1, 0] = 0.001
    found = verdicts(logits, torch.zeros(1, dtype=torch.long))
    assert found.worst.tolist() == [True]
    assert found.all_views.tolist() == [False]


def test_a_margin_is_the_smallest_that_a_verdict_hangs_on():
    # Image 0: view 1 is right by 0.25. Image 1: view 0, wrong by 0.5, has the higher loss by less than view 1 is right
    # by: with a bit more loss, that one would be the worst view, and right.
    logits = torch.tensor([[[5.0, 1.0, 0.0], [1.0, 0.75, 0.0]], [[0.0, 0.5, -9.0], [0.3, 0.0, 0.0]]])
    found = verdicts(logits, torch.zeros(2, dtype=torch.long))
    assert found.worst.tolist() == [True, False]
    losses = [math.log(1 + math.exp(0.5) + math.exp(-9.0)), math.log(math.exp(0.3) + 2) - 0.3]
    assert found.margin.tolist() == pytest.approx([0.25, losses[0] - losses[1]], abs=1e-5)


class TinyNet(nn.Module):
    """A fixed random network that is right on some views of most images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 7 * 7, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images - 0.5)
        return logits


@pytest.fixture(scope="module")
def crowd():
    """Images of side 9, a judge, each image's own natural answer as its label, and the brute-force grid verdicts."""
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (40, 9, 9, 3)).astype(np.uint8))
    net = TinyNet().eval()

    judge = ModuleJudge(net, torch.float32)

    # Blends with a flat image make some images robust, and some not.
    images = (images * torch.linspace(0.15, 1, 40)[:, None, None, None]).to(torch.uint8)
    labels = judge(images).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 3  # some wrong from the start
    every = torch.from_numpy(matrices(grid(LIMITS), 9)).expand(40, GRID_VIEWS, 2, 3)
    brute_BG = judge(warp(images, every).view(-1, 9, 9, 3)).argmax(dim=1).view(40, GRID_VIEWS) == labels[:, None]
    return images, labels, judge, brute_BG


def test_the_planted_crowd_is_worth_testing(crowd):
    _, _, _, brute_BG = crowd
    natural, survived = brute_BG[:, GRID_IDENTITY], brute_BG.all(dim=1)
    assert 3 <= survived.sum() < natural.sum() - 3


@pytest.mark.parametrize(("batch", "portion"), [(6, 7), (64, 1), (64, 40), (1000, 7)])
def test_pooled_survivors_equal_brute_force(crowd, batch, portion):
    images, labels, judge, brute_BG = crowd
    natural = brute_BG[:, GRID_IDENTITY].nonzero()[:, 0]
    pool = GridSurvivors(BatchedForward(judge, batch, pad=True), LIMITS, 9)
    found = []
    for part in natural.split(portion):
        pool.add(images[part], labels[part].tolist(), part.tolist())
        found += pool.take_verdicts()
    pool.finish()
    found += pool.take_verdicts()
    assert {v.index: v.survived for v in found} == {int(i): bool(brute_BG[i].all()) for i in natural}
    assert len(found) == len(natural)
    for verdict in found:
        assert verdict.views_judged == GRID_VIEWS if verdict.survived else 1 < verdict.views_judged <= GRID_VIEWS
    broken = [verdict.views_judged for verdict in found if not verdict.survived]
    if batch < 1000:
        assert np.mean(broken) < GRID_VIEWS / 4


def test_the_first_to_come_are_the_first_to_be_settled():
    """What is in flight when the time is up is lost; all at once, nothing would be settled for 194 turns."""
    turns: list[None] = []
    right = FunctionJudge(lambda views: torch.tensor([[1.0, 0.0]]).expand(len(views), 2))
    pool = GridSurvivors(BatchedForward(right, 64, pad=True), LIMITS, 9, moved=lambda: turns.append(None))
    images = torch.zeros(16, 9, 9, 3, dtype=torch.uint8)
    pool.add(images, [0] * 16, list(range(16)))
    settled, settled_at = [], []
    while pool.pending:
        pool.turn()
        for verdict in pool.take_verdicts():
            settled.append(verdict.index)
            settled_at.append(len(turns))
    assert settled == list(range(16))
    assert settled_at[0] <= 20 and settled_at[7] <= 110  # at 774 views each, 64 in a turn, 12 would be the least
    assert len(turns) == -(-16 * 776 // 64)  # no pass but the last has room


def batches_of(images, labels, views, size, limits=LIMITS):
    for begin in range(0, len(images), size):
        index = np.arange(begin, min(begin + size, len(images)))
        drawn = draw_matrices(pack_key(EVALUATION, 0), 0, index, Views(views, limits), images.shape[1])
        part = slice(begin, begin + size)
        yield Batch(warp(images[part], torch.from_numpy(drawn)), labels[part], torch.from_numpy(index))


def judged(judge: Judge, batches, size: int) -> list[ImageVerdict]:
    """All verdicts, in two stages: first without the grid, then the grid on the images that are right."""
    passes = BatchedForward(judge, size, pad=True)
    batches = list(batches)
    found = [verdict for batch in batches for verdict in judge_images(passes, batch)]
    assert all(verdict.grid is None for verdict in found)
    survivors = GridSurvivors(passes, LIMITS, batches[0].side)
    right = {verdict.index for verdict in found if verdict.natural}
    for batch in batches:
        rows = [row for row, index in enumerate(batch.index.tolist()) if index in right]
        judge_grid(survivors, [Batch(batch.views[rows], batch.labels[rows], batch.index[rows])])
    return add_grid(found, survivors.take_verdicts(), {verdict.index for verdict in found})


@pytest.mark.parametrize("size", [1, 9, 40])
def test_two_stages_give_every_image_one_verdict_whatever_the_batches(crowd, size):
    images, labels, judge, brute_BG = crowd
    found = judged(judge, batches_of(images, labels, 10, size), 32)
    assert sorted(v.index for v in found) == list(range(40))
    for verdict in found:
        assert verdict.natural == bool(brute_BG[verdict.index, GRID_IDENTITY])
        assert verdict.grid == bool(brute_BG[verdict.index].all())
    drawn = torch.from_numpy(draw_matrices(pack_key(EVALUATION, 0), 0, np.arange(40), Views(10, LIMITS), 9))
    logits = judge(warp(images, drawn).view(-1, 9, 9, 3)).view(40, 11, 3)
    loss = -logits.log_softmax(dim=2)[torch.arange(40)[:, None], torch.arange(11), labels[:, None]]
    worst = logits.argmax(dim=2)[torch.arange(40), loss.argmax(dim=1)] == labels
    assert [v.worst10 for v in sorted(found, key=lambda v: v.index)] == worst.tolist()


def test_verdicts_that_arithmetic_can_change_are_known_as_near_ties(crowd):
    """Logits as small as margins of near ties, with noise as of sums in another order."""
    images, labels, judge, _ = crowd

    def found(seed: int) -> dict[int, ImageVerdict]:
        noise = torch.Generator().manual_seed(seed)

        def noisy(views: Tensor) -> Tensor:
            logits: Tensor = judge(views) * 3e-3
            logits += 2e-5 * torch.rand(logits.shape, generator=noise)
            return logits

        return {v.index: v for v in judged(FunctionJudge(noisy), batches_of(images, labels, 10, 40), 32)}

    one, ties = found(0), {index for index, verdict in found(0).items() if verdict.near_tie}
    assert 3 <= len(ties) <= 37
    different = set()
    for seed in range(1, 6):
        other = found(seed)
        different |= {index for index in one if decided(one[index]) != decided(other[index])}
    assert different
    assert different <= ties


def decided(verdict: ImageVerdict) -> tuple[bool | None, ...]:
    return verdict.natural, verdict.random, verdict.worst10, verdict.worst10_any, verdict.grid


def test_random_views_never_remove_a_survivor(crowd):
    images, labels, _, _ = crowd
    batches = list(batches_of(images, labels, 10, 40))
    random_views = {view.numpy().tobytes() for view in batches[0].views[:, 1:].reshape(-1, 9, 9, 3)}
    known = {view.numpy().tobytes(): int(label) for view, label in zip(images, labels)}

    def judge(views: Tensor) -> Tensor:
        """Right on everything but the random views."""
        logits = torch.zeros(len(views), 4)
        for n, view in enumerate(views):
            logits[n, 3 if view.numpy().tobytes() in random_views else 0] = 1
        return logits

    assert known
    batch = Batch(batches[0].views, torch.zeros(40, dtype=torch.long), batches[0].index)
    found = judged(FunctionJudge(judge), [batch], 64)
    assert all(v.natural and v.grid and not v.random and not v.worst10 and not v.worst10_any for v in found)


def test_an_image_judged_twice_is_refused(crowd):
    images, labels, judge, _ = crowd
    twice = [*batches_of(images[:4], labels[:4], 2, 4), *batches_of(images[:4], labels[:4], 2, 4)]
    passes = BatchedForward(judge, 8, pad=True)
    found = [verdict for batch in twice for verdict in judge_images(passes, batch)]
    with pytest.raises(ValueError, match="more than once"):
        summarize(found, LIMITS, 2, partial=False)
    with pytest.raises(ValueError, match="nothing to report"):
        summarize([], LIMITS, 2, partial=False)
