"""What can be wrong with a data set: the kinds of findings, and those that a file's header shows."""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

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
    """A kind of finding: what it does to a run (KILLS, CHANGES its result, or only a NOTE), and what to do about it."""

    severity: str
    advice: str


KINDS = {
    "unreadable": Kind(KILLS, "the file cannot be read; mend its permissions, its link or the disk, or exclude it"),
    "special": Kind(KILLS, "a pipe, a socket or a device: reading it may never end; remove or exclude it"),
    "empty": Kind(KILLS, "the file has no content; fetch it again or exclude it"),
    "truncated": Kind(KILLS, "the file ends before its image does; fetch it again or exclude it"),
    "gif": Kind(KILLS, "the decoder knows no GIF; convert it or exclude it"),
    "not_an_image": Kind(KILLS, "the content is no image; fetch it again or exclude it"),
    "undecodable": Kind(KILLS, "the content is damaged, or of a variant the decoder does not know; exclude it"),
    "too_large": Kind(KILLS, "decoding it takes more memory than a run may have; make it smaller or exclude it"),
    "crash": Kind(KILLS, "the decoder itself dies of it; exclude it"),
    "hang": Kind(KILLS, "the decoder does not come to an end; exclude it"),
    "rotated": Kind(CHANGES, "EXIF says to turn it, which training ignores, as torchvision does; turn the pixels"),
    "damaged": Kind(NOTE, "it decodes, but the decoder complains: parts may be grey or garbled; look at it"),
    "cmyk": Kind(NOTE, "its colours are CMYK; they are converted, as well as can be without a profile"),
    "deep": Kind(NOTE, "more than 8 bits a channel: scaled to 8, where PIL, and so torchvision, clips"),
    "wrong_extension": Kind(NOTE, "its content is of another format than its name says, which decodes all the same"),
    "several_frames": Kind(NOTE, "it holds several images; the first is used"),
    "thin": Kind(NOTE, "long and thin: an evaluation on a GPU resizes all of it, which takes memory"),
}


class Finding(NamedTuple):
    """Something found: its kind, and in words what it is."""

    kind: str
    detail: str


def read_regular(path: str) -> bytes | Finding:
    """A file's content, or why it cannot be had; a pipe, a socket or a device is never opened."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Finding("special", "it is no regular file")
        if found.st_size > MAX_BYTES:
            return Finding("too_large", f"it has {found.st_size / 1e9:.1f} GB")
        with open(path, "rb") as file:
            return file.read()
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
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            return list(_oddities(path, image))
    except Exception:  # PIL is stricter about headers than the decoder, whose verdict counts
        return []


def _oddities(path: str, image: Image.Image) -> list[Finding]:
    found = []
    expected = _FORMATS.get(os.path.splitext(path)[1].lower())
    actual = "JPEG" if image.format == "MPO" else image.format
    if expected and actual != expected:
        found.append(Finding("wrong_extension", f"it is a {actual}"))
    if image.mode == "CMYK":
        found.append(Finding("cmyk", "it is CMYK"))
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        found.append(Finding("deep", f"its mode is {image.mode}"))
    if getattr(image, "n_frames", 1) > 1:
        found.append(Finding("several_frames", f"it holds {getattr(image, 'n_frames', 1)} images"))
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        found.append(Finding("thin", f"it has {width} x {height} pixels"))
    # To look for EXIF at its end, PIL would decode a PNG.
    orientation = 1 if image.format == "PNG" and "exif" not in image.info else image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        found.append(Finding("rotated", f"its EXIF orientation is {orientation}"))
    return found
