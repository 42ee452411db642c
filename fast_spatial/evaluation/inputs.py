"""Inputs of an evaluation: a checkpoint's model and a folder's images, matched before any work starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.data.images import load_split
from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.dataset import ImageIndex


class Inputs(NamedTuple):
    """A model in evaluation mode, the images, the positions of those that meet the grid, and the image size."""

    model: Classifier
    images: ImageIndex
    on_grid: set[int]
    side: int


def load_model_and_images(config: EvaluateConfig) -> Inputs:
    """The validated inputs of an evaluation.

    Raises:
        UserError: on a checkpoint that does not fit the architecture or the folder's classes.

    """
    path = Path(config.checkpoint)
    weights = checkpoint.read_weights(path)
    model = checkpoint.build_classifier(path, weights, config.arch)
    images = load_split(config.data, "val", exclude=config.exclude)
    if weights.classes is not None and images.classes[: len(weights.classes)] == weights.classes:
        images = images.first_classes(len(weights.classes))
    elif weights.classes is not None:
        images = _relabel(images, weights.classes, path, config)
    elif len(images.classes) < weights.num_classes and not config.allow_partial_classes:
        raise UserError(
            f"--data {config.data}: has {len(images.classes)} classes, and the model {weights.num_classes} outputs",
            "if the folders are the model's first outputs, in order, add --allow-partial-classes",
        )
    if len(images.classes) > weights.num_classes:
        raise UserError(
            f"--data {config.data}: has {len(images.classes)} classes, and the model {weights.num_classes} outputs",
            "name the folder of the model's training, or one with some of its classes",
        )
    if config.max_images:
        images = images.random_subset(config.max_images)
    return Inputs(model.eval(), images, _on_grid(config, images), config.image_size or weights.side or 224)


def _on_grid(config: EvaluateConfig, images: ImageIndex) -> set[int]:
    if not config.grid:
        return set()
    if config.grid_images:
        return _positions_of(Path(config.grid_images), images)
    if not config.grid_per_class:
        return set(range(len(images)))
    try:
        return set(images.balanced_positions(config.grid_per_class).tolist())
    except ValueError as error:
        raise UserError(f"--grid-per-class {config.grid_per_class}: {error}", "lower --grid-per-class") from None


def _relabel(images: ImageIndex, classes: tuple[str, ...], path: Path, config: EvaluateConfig) -> ImageIndex:
    """Labels by class name, for a folder that holds only some of the model's classes."""
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise UserError(f"--data {config.data}: class {unknown[0]} is not among the {len(classes)} classes of {path}")
    if not config.allow_partial_classes:
        raise UserError(
            f"--data {config.data}: has {len(images.classes)} of the {len(classes)} classes of {path}",
            "to evaluate only these classes, add --allow-partial-classes",
        )
    positions = np.array([classes.index(name) for name in images.classes])
    return dataclasses.replace(images, labels=positions[images.labels])


def _positions_of(listing: Path, images: ImageIndex) -> set[int]:
    if not listing.is_file():
        raise UserError(f"--grid-images {listing}: no such file", "name a file with one path per line, as in the JSON")
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--grid-images {listing}: cannot read the file ({error})", "give a text file with one path per line"
        ) from None
    wanted = {line.strip() for line in lines if line.strip()}
    where = {images.relative_path(position): position for position in range(len(images))}
    missing = sorted(wanted - where.keys())
    if missing:
        raise UserError(
            f"--grid-images {listing}: {missing[0]} is not among the images; paths look like {next(iter(where))}"
        )
    return {where[name] for name in wanted}
