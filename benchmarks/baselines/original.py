"""The baseline: loading, warps, attacks and training as in spatial-pytorch (Engstrom et al., 2019), reimplemented.

It uses float32, NCHW, one forward pass per try, and one image at a time on the grid. Faster settings of its parts are
options, so that the comparison uses the fastest one on this machine.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms

from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.models.classifier import Classifier

PREFETCH = 1  # batches that each worker prefetches
GRID_CHUNK = 200  # views in a forward pass of the grid
# PCA of ImageNet's colours in [0, 1].
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def coordinates_by_matmul(matrices_N23: Tensor, side: int) -> Tensor:
    """Sampling locations [N, S, S, 2] by a matrix product per pixel, as in the original code."""
    axis = torch.linspace(-1, 1, side, device=matrices_N23.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    homogeneous = torch.stack([x, y, torch.ones_like(x)], dim=-1)[None, ..., None]
    return (matrices_N23[:, None, None].expand(-1, side, side, -1, -1) @ homogeneous).squeeze(-1)


def coordinates_by_affine_grid(matrices_N23: Tensor, side: int) -> Tensor:
    """Sampling locations [N, S, S, 2] by `torch.nn.functional.affine_grid`."""
    return affine_grid(matrices_N23, [len(matrices_N23), 3, side, side], align_corners=True)


Coordinates = Callable[[Tensor, int], Tensor]


def transform(images_N3SS: Tensor, angles_N: Tensor, shifts_N2: Tensor, coordinates: Coordinates) -> Tensor:
    """Rotate (degrees) and translate (fraction of the image size) images, float [N, 3, S, S]."""
    cos, sin = torch.cos(torch.deg2rad(angles_N)), torch.sin(torch.deg2rad(angles_N))
    rows = [torch.stack([cos, -sin, 2 * shifts_N2[:, 0]], dim=1), torch.stack([sin, cos, 2 * shifts_N2[:, 1]], dim=1)]
    locations = coordinates(torch.stack(rows, dim=1), images_N3SS.shape[-1])
    return grid_sample(images_N3SS, locations, align_corners=True)


def random_transform(images_N3SS: Tensor, degrees: float, translate: float, coordinates: Coordinates) -> Tensor:
    """A random warp of every image."""
    N = len(images_N3SS)
    angles = torch.empty(N, device=images_N3SS.device).uniform_(-degrees, degrees)
    shifts = torch.empty(N, 2, device=images_N3SS.device).uniform_(-translate, translate)
    return transform(images_N3SS, angles, shifts, coordinates)


class Original:
    """Attack and training step of the original code, in one process."""

    def __init__(self, model: Classifier, *, limits: SpatialLimits, coordinates: Coordinates) -> None:
        self.net = copy.deepcopy(model.net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._std = 1 / (255 * model.scale.view(3, 1, 1))
        self._mean = -model.shift.view(3, 1, 1) * self._std
        self._degrees, self._translate, self._coordinates = limits.degrees, limits.translate, coordinates
        self._optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1], which are normalized first."""
        logits: Tensor = self.net((images - self._mean) / self._std)
        return logits

    @torch.no_grad()
    def worst_of(self, images: Tensor, labels: Tensor, tries: int) -> Tensor:
        """The view with the highest loss of each image: the identity view, then one forward pass per try."""
        was_training = self.net.training
        self.net.eval()
        worst = images.clone()
        highest = cross_entropy(self.logits(images), labels, reduction="none")
        for _ in range(tries):
            views = random_transform(images, self._degrees, self._translate, self._coordinates).clamp(0, 1)
            losses = cross_entropy(self.logits(views), labels, reduction="none")
            higher = losses > highest
            worst[higher], highest[higher] = views[higher], losses[higher]
        self.net.train(was_training)
        return worst

    def step(self, images: Tensor, labels: Tensor, tries: int) -> float:
        """A training step on the worst views; returns the loss."""
        self.net.train()
        loss = cross_entropy(self.logits(self.worst_of(images, labels, tries)), labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()

    @torch.no_grad()
    def survives_grid(self, image: Tensor, label: int, rotations: int = 31, translations: int = 5) -> bool:
        """Whether one image, float [3, S, S], is classified correctly in all views. All are warped first."""
        self.net.eval()
        angles = torch.linspace(-self._degrees, self._degrees, rotations)
        shifts = torch.linspace(-self._translate, self._translate, translations)
        views = torch.tensor(list(itertools.product(angles, shifts, shifts)), device=image.device)
        warped = transform(image.repeat(len(views), 1, 1, 1), views[:, 0], views[:, 1:], self._coordinates)
        parts = torch.split(warped, GRID_CHUNK)
        return all(bool((self.logits(part).argmax(dim=1) == label).all()) for part in parts)


class Lighting:
    """AlexNet-style colour noise along the principal components of ImageNet's colours."""

    def __call__(self, image: Tensor) -> Tensor:
        weights = torch.normal(0.0, 0.05, (3,)) * torch.tensor(_EIGENVALUES)
        return image + (torch.tensor(_EIGENVECTORS) @ weights).view(3, 1, 1)


@dataclass(frozen=True)
class Warps:
    """Random warps of a batch of images: float [B, warps, 3, S, S]."""

    warps: int
    limits: SpatialLimits

    def __call__(self, images: Tensor) -> Tensor:
        degrees, translate = self.limits.degrees, self.limits.translate
        views = [random_transform(images, degrees, translate, coordinates_by_affine_grid) for _ in range(self.warps)]
        return torch.stack(views, dim=1)

    def of_one(self, image: Tensor) -> Tensor:
        """Random warps of one image: float [warps, 3, S, S]."""
        return self(image[None])[0]


def loader(
    folder: Path, *, side: int, batch: int, workers: int, warps: int, limits: SpatialLimits, in_workers: bool
) -> Generator[Tensor, None, None]:
    """Endless batches of torchvision's DataLoader with PIL: float [B, max(warps, 1), 3, S, S]. Close the generator.

    Args:
        folder: data folder with `train/`.
        side: image size in pixels.
        batch: images per batch.
        workers: worker processes.
        warps: number of random warps per image by `grid_sample`; 0: only the identity view.
        limits: limits of the warps.
        in_workers: warp in the workers, image by image; otherwise in the main process, batch by batch.

    """
    warp = Warps(warps, limits)
    steps: list[Any] = [
        transforms.RandomResizedCrop(side),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.1, 0.1, 0.1),
        transforms.ToTensor(),
        Lighting(),
    ]
    if warps and in_workers:
        steps.append(warp.of_one)
    images = torchvision.datasets.ImageFolder(str(folder / "train"), transforms.Compose(steps))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than CPUs is intended
        data = DataLoader(
            images,
            batch_size=batch,
            # A very long epoch: on few images, workers would wait for one another at the end of each epoch.
            sampler=RandomSampler(images, replacement=True, num_samples=1 << 30),
            num_workers=workers,
            prefetch_factor=PREFETCH,
            drop_last=True,
            multiprocessing_context="spawn",  # forking a process with threads may crash
        )
        batches: Any = iter(data)
    try:
        for floats, _ in batches:
            if not warps:
                yield floats[:, None]
            elif in_workers:
                yield floats
            else:
                yield warp(floats)
    finally:
        # Stop the workers now: at interpreter exit, they would be killed with threads still running.
        batches._shutdown_workers()
