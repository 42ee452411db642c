"""Problems of a data set: the kinds of findings, and the checks of folders and file headers."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from fast_spatial.errors import UserError
from fast_spatial.pipelines.dataset import files_below, is_image, list_classes

KILLS, CHANGES, NOTE = "kills", "changes", "note"
# PIL, and so torchvision's loader, refuses larger images. Decoded, this many pixels take half a gigabyte.
MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 30
MAX_ASPECT = 100
_ORIENTATION = 0x0112
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: its effect on a run: KILLS ends it, CHANGES alters its result, NOTE is harmless.
        advice: meaning and fix, in one sentence.
        exclude: whether excluding the file fixes it.

    """

    severity: str
    advice: str
    exclude: bool = False


KINDS = {
    # of folders
    "no_classes": Kind(KILLS, "a split must contain one folder per class"),
    "classes_differ": Kind(KILLS, "train/ and val/ need the same class folders, or labels would not match"),
    "empty_class": Kind(KILLS, "the class folder contains no images; add some, or remove it from both splits"),
    "bad_folder": Kind(KILLS, "the folder cannot be read; fix or remove it"),
    "class_order": Kind(NOTE, "labels follow the names sorted as text, as in torchvision; some models sort numbers"),
    "ignored": Kind(NOTE, "files without an image extension, or outside class folders, are not used"),
    # of files
    "unreadable": Kind(KILLS, "the file cannot be read; fix its permissions, link or disk, or exclude it", True),
    "special": Kind(KILLS, "a pipe, socket or device; reading it may never end; remove it", True),
    "empty": Kind(KILLS, "the file is empty; download it again or exclude it", True),
    "truncated": Kind(KILLS, "the file is truncated; download it again or exclude it", True),
    "gif": Kind(KILLS, "the decoder does not support GIF; convert it or exclude it", True),
    "not_an_image": Kind(KILLS, "the content is not an image; download it again or exclude it", True),
    "undecodable": Kind(KILLS, "the file is damaged, or uses an unsupported variant of its format; exclude it", True),
    "too_large": Kind(KILLS, "decoding it needs too much memory; shrink it or exclude it", True),
    "crash": Kind(KILLS, "it crashes the decoder; exclude it", True),
    "hang": Kind(KILLS, "the decoder does not finish; exclude it", True),
    "duplicate": Kind(CHANGES, "a training image identical to one in val/; exclude it from training", True),
    "rotated": Kind(CHANGES, "EXIF asks for a rotation; training ignores it, as torchvision does; rotate the pixels"),
    "damaged": Kind(NOTE, "it decodes with a warning: parts may be grey or garbled; look at it"),
    "cmyk": Kind(NOTE, "its colours are CMYK; they are converted without a color profile"),
    "deep": Kind(NOTE, "more than 8 bits per channel; they are scaled to 8, where PIL, and so torchvision, may clip"),
    "wrong_extension": Kind(NOTE, "its format differs from its extension; it decodes correctly"),
    "several_frames": Kind(NOTE, "it contains several images; the first is used"),
    "thin": Kind(NOTE, "long and thin: evaluation on a GPU resizes all of it and needs much memory"),
}


class Finding(NamedTuple):
    """A finding: its kind (a key of `KINDS`), and details in words."""

    kind: str
    detail: str


class Survey(NamedTuple):
    """A split's folders: its classes, their number of images, and (path, finding) pairs."""

    classes: list[str]
    images: int
    findings: list[tuple[str, Finding]]


def survey(data: Path, split: str) -> Survey:
    """Check a split's folders, without opening a file."""
    root = data / split
    try:
        classes = list_classes(data, split)
    except UserError as error:
        why = f"{error.message.removeprefix(f'--data {data}: ')}: {error.advice}"
        return Survey([], 0, [(str(root), Finding("no_classes", why))])
    findings: list[tuple[str, Finding]] = []
    images = 0
    ignored = Counter(_extension(entry.name) for entry in os.scandir(root) if not entry.is_dir())
    for name in classes:
        before = images
        for path in files_below(root / name, lambda folder, why: findings.append((folder, Finding("bad_folder", why)))):
            if is_image(path):
                images += 1
            else:
                ignored[_extension(path)] += 1
        if images == before:
            findings.append((str(root / name), Finding("empty_class", "no images in it")))
    if ignored:
        most = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:5]
        counts = ", ".join(f"{extension} {count}" for extension, count in most)
        findings.append((str(root), Finding("ignored", f"not used: {counts}")))
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        first, second = next((a, b) for a, b in pairwise(classes) if int(a) > int(b))
        findings.append((str(root), Finding("class_order", f"{first} comes before {second}")))
    return Survey(classes, images, findings)


def compare_classes(data: Path, train: list[str], val: list[str]) -> list[tuple[str, Finding]]:
    """Findings for class folders that exist in only one split."""
    pairs = (("train", "val", train, val), ("val", "train", val, train))
    return [
        (str(data / here / name), Finding("classes_differ", f"missing in {there}/"))
        for here, there, mine, others in pairs
        for name in sorted(set(mine) - set(others))
    ]


def images_of(data: Path, split: str, classes: list[str]) -> Iterator[str]:
    """The paths of a split's images, class by class."""
    for name in classes:
        yield from sorted(filter(is_image, files_below(data / split / name, lambda *_: None)))


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "no extension"


class Content(NamedTuple):
    """A file's content, and its modification time in nanoseconds."""

    data: bytes
    mtime_ns: int


def read_regular(path: str) -> Content | Finding:
    """A file's content, or the reason why it cannot be read. Pipes, sockets and devices are never opened."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Finding("special", "not a regular file")
        if found.st_size > MAX_BYTES:
            return Finding("too_large", f"{found.st_size / 1e9:.1f} GB")
        with open(path, "rb") as file:
            return Content(file.read(), found.st_mtime_ns)
    except OSError as error:
        return Finding("unreadable", f"unreadable: {error.strerror}")


def explain_failure(content: bytes, reason: str) -> Finding:
    """The finding for content that the decoder refused for `reason`."""
    detail = f"cannot be decoded: {reason}"
    if not content:
        return Finding("empty", "cannot be decoded: empty file")
    if content.startswith((b"GIF87a", b"GIF89a")):
        return Finding("gif", "cannot be decoded: a GIF")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:
        return Finding("not_an_image", detail)
    except Exception as error:  # PIL raises any exception on broken content
        return Finding("truncated" if "truncated" in str(error).lower() else "undecodable", detail)
    return Finding("undecodable", detail)


def inspect_header(path: str, content: bytes) -> list[Finding]:
    """Findings from the header of a file that decodes."""
    found: list[Finding] = []
    # PIL is stricter about headers than the decoder and may raise any exception; the decoder's verdict counts.
    with suppress(Exception), warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
        for oddity in _oddities(path, image):
            found.append(oddity)
    return found


def _oddities(path: str, image: Image.Image) -> Iterator[Finding]:
    expected = _FORMATS.get(os.path.splitext(path)[1].lower())
    actual = "JPEG" if image.format == "MPO" else image.format
    if expected and actual != expected:
        yield Finding("wrong_extension", f"the content is {actual}")
    if image.mode == "CMYK":
        yield Finding("cmyk", "CMYK")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        yield Finding("deep", f"mode {image.mode}")
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield Finding("thin", f"{width} x {height} pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        yield Finding("several_frames", f"{frames} images")
    # PIL would decode a whole PNG to look for EXIF at its end.
    orientation = 1 if image.format == "PNG" and "exif" not in image.info else image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        yield Finding("rotated", f"EXIF orientation {orientation}")
