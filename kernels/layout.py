"""Columns of the rows that describe one image, in arrays that Python, numba and Triton share."""

from __future__ import annotations

from enum import IntEnum


class Header(IntEnum):
    """Columns of the int64 header, which names an image of a batch."""

    LABEL = 0
    INDEX = 1
    KEY = 2
    EPOCH = 3
    SIDE = 4
    TICKET = 5


class Setting(IntEnum):
    """Columns of the float64 settings, an `Augmentation` as compiled code reads it."""

    CENTER = 0
    SCALE_MIN = 1
    SCALE_MAX = 2
    RATIO_MIN = 3
    RATIO_MAX = 4
    FLIP_PROB = 5
    BRIGHTNESS = 6
    CONTRAST = 7
    SATURATION = 8
    LIGHTING_STD = 9


class Geometry(IntEnum):
    """Columns of the int32 geometry: the box to decode, the size to resize it to, and the crop of the result."""

    BOX_Y = 0
    BOX_X = 1
    BOX_H = 2
    BOX_W = 3
    RESIZED_H = 4
    RESIZED_W = 5
    CROP_Y = 6
    CROP_X = 7
    CROP_H = 8
    CROP_W = 9


class Colour(IntEnum):
    """Columns of the float32 colour numbers: factors of the jitter, and offsets of the lighting (of 255)."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    LIGHTING_RED = 3
    LIGHTING_GREEN = 4
    LIGHTING_BLUE = 5
