"""What can be wrong with a data set: the kinds of findings, and those that folders and files' headers show."""

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
# PIL, and so torchvision's loader, refuses images of more pixels; decoded, they take half a gigabyte.
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
        severity: what it does to a run: KILLS it, CHANGES its result, or only a NOTE.
        advice: what it means and what to do, in a sentence.
        exclude: whether leaving the file out mends it.

    """

    severity: str
    advice: str
    exclude: bool = False


KINDS = {
    # of folders
    "no_classes": Kind(KILLS, "a split is a folder of class folders"),
    "classes_differ": Kind(KILLS, "train/ and val/ need the same class folders, or labels would not mean the same"),
    "empty_class": Kind(KILLS, "the class folder holds no image; fill it, or remove it from both splits"),
    "bad_folder": Kind(KILLS, "the folder cannot be walked; mend or remove it"),
    "class_order": Kind(NOTE, "labels follow the names as text, as torchvision's; not every model counts like that"),
    "ignored": Kind(NOTE, "files without an image's extension, or outside of class folders, are not used"),
    # of files
    "unreadable": Kind(KILLS, "it cannot be read; mend its permissions, its link or the disk, or exclude it", True),
    "special": Kind(KILLS, "a pipe, a socket or a device, from which reading may never end; remove it", True),
    "empty": Kind(KILLS, "it has no content; fetch it again or exclude it", True),
    "truncated": Kind(KILLS, "it ends before its image does; fetch it again or exclude it", True),
    "gif": Kind(KILLS, "the decoder knows no GIF; convert it or exclude it", True),
    "not_an_image": Kind(KILLS, "its content is no image; fetch it again or exclude it", True),
    "undecodable": Kind(KILLS, "it is damaged, or of a variant that the decoder does not know; exclude it", True),
    "too_large": Kind(KILLS, "decoding it takes more memory than there may be; shrink it or exclude it", True),
    "crash": Kind(KILLS, "the decoder itself dies of it; exclude it", True),
    "hang": Kind(KILLS, "the decoder does not come to an end with it; exclude it", True),
    "duplicate": Kind(CHANGES, "a training image that is in val/ too, byte for byte; exclude it from training", True),
    "rotated": Kind(CHANGES, "EXIF says to turn it, which training ignores, as torchvision does; turn its pixels"),
    "damaged": Kind(NOTE, "it decodes, but the decoder complains: parts may be grey or garbled; look at it"),
    "cmyk": Kind(NOTE, "its colours are CMYK, which are converted without a profile"),
    "deep": Kind(NOTE, "more than 8 bits a channel: scaled to 8, where PIL, and so torchvision, may clip"),
    "wrong_extension": Kind(NOTE, "its content is of another format than its name says; it decodes all the same"),
    "several_frames": Kind(NOTE, "it holds several images; the first is used"),
    "thin": Kind(NOTE, "long and thin: evaluating it on a GPU resizes all of it, which takes memory"),
}


class Finding(NamedTuple):
    """Something found: its kind, and in words what it is."""

    kind: str
    detail: str


class Survey(NamedTuple):
    """A split's folders: its classes, how many images they hold, and what was found (path, finding)."""

    classes: list[str]
    images: int
    findings: list[tuple[str, Finding]]


def survey(data: Path, split: str) -> Survey:
    """What there is to say about a split without opening a file."""
    root = data / split
    try:
        classes = list_classes(data, split)
    except UserError as error:
        return Survey([], 0, [(str(root), Finding("no_classes", str(error).removeprefix(f"--data {data}: ")))])
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
            findings.append((str(root / name), Finding("empty_class", "it holds no image")))
    if ignored:
        most = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:5]
        counts = ", ".join(f"{extension} {count}" for extension, count in most)
        findings.append((str(root), Finding("ignored", f"not used: {counts}")))
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        first, second = next((a, b) for a, b in pairwise(classes) if int(a) > int(b))
        findings.append((str(root), Finding("class_order", f"{first} comes before {second}")))
    return Survey(classes, images, findings)


def compare_classes(data: Path, train: list[str], val: list[str]) -> list[tuple[str, Finding]]:
    """The class folders that only one split has."""
    pairs = (("train", "val", train, val), ("val", "train", val, train))
    return [
        (str(data / here / name), Finding("classes_differ", f"{there}/ has no such class"))
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
    """What a file held, and when it was last changed (nanoseconds)."""

    data: bytes
    mtime_ns: int


def read_regular(path: str) -> Content | Finding:
    """A file's content, or why it cannot be had; a pipe, a socket or a device is never opened."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Finding("special", "it is no regular file")
        if found.st_size > MAX_BYTES:
            return Finding("too_large", f"it has {found.st_size / 1e9:.1f} GB")
        with open(path, "rb") as file:
            return Content(file.read(), found.st_mtime_ns)
    except OSError as error:
        return Finding("unreadable", f"unreadable: {error.strerror}")


def explain_failure(content: bytes, reason: str) -> Finding:
    """What is wrong with a content that the decoder refused for `reason`."""
    detail = f"it cannot be decoded: {reason}"
    if not content:
        return Finding("empty", "it cannot be decoded: it is empty")
    if content.startswith((b"GIF87a", b"GIF89a")):
        return Finding("gif", "it cannot be decoded: it is a GIF")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:
        return Finding("not_an_image", detail)
    except Exception as error:  # PIL raises whatever a broken content makes it run into
        return Finding("truncated" if "truncated" in str(error).lower() else "undecodable", detail)
    return Finding("undecodable", detail)


def inspect_header(path: str, content: bytes) -> list[Finding]:
    """What is odd about a file that decodes, from its header alone."""
    found: list[Finding] = []
    # PIL is stricter about headers than the decoder, whose verdict counts, and raises whatever it runs into.
    with suppress(Exception), warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
        for oddity in _oddities(path, image):
            found.append(oddity)
    return found


def _oddities(path: str, image: Image.Image) -> Iterator[Finding]:
    expected = _FORMATS.get(os.path.splitext(path)[1].lower())
    actual = "JPEG" if image.format == "MPO" else image.format
    if expected and actual != expected:
        yield Finding("wrong_extension", f"it is a {actual}")
    if image.mode == "CMYK":
        yield Finding("cmyk", "it is CMYK")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        yield Finding("deep", f"its mode is {image.mode}")
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield Finding("thin", f"it has {width} x {height} pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        yield Finding("several_frames", f"it holds {frames} images")
    # To look for EXIF at its end, PIL would decode a PNG.
    orientation = 1 if image.format == "PNG" and "exif" not in image.info else image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        yield Finding("rotated", f"its EXIF orientation is {orientation}")
