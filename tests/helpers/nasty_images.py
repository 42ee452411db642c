"""A corpus of problematic files, each with the findings that `check-data` must report."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fast_spatial.kernels.sampling import TRAINING, epoch_order, pack_key

PAGE = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>nothing here</body></html>\n"
STARTS_OF_FRAME = (b"\xff\xc0", b"\xff\xc2")  # baseline, progressive
START_OF_SCAN = b"\xff\xda"


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, RGB."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    waves = np.stack([np.sin(rows / 9 + seed), np.cos(columns / 7), np.sin((rows + columns) / 11)], axis=-1)
    return Image.fromarray((128 + 80 * waves + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file of a format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, **options: object) -> bytes:
    """A small JPEG file."""
    return encode(picture(seed=seed), "JPEG", **{"quality": 90, **options})


def with_size(content: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    where = next(content.index(marker) for marker in STARTS_OF_FRAME if marker in content) + 5
    return content[:where] + struct.pack(">HH", height, width) + content[where + 4 :]


def with_middle(content: bytes, middle: bytes) -> bytes:
    """A JPEG with a piece of its coded pixels replaced."""
    begin = content.index(START_OF_SCAN)
    where = begin + (len(content) - begin) // 2
    return content[:where] + middle + content[where + len(middle) :]


def png_bomb(width: int = 60000, height: int = 60000) -> bytes:
    """A PNG of a few hundred bytes that claims to decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100_000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def palette_with_alpha() -> bytes:
    """A PNG with a palette, one of whose colours is transparent."""
    return encode(picture().quantize(16), "PNG", transparency=3)


def frames() -> list[Image.Image]:
    """The later images of a multi-frame file."""
    return [picture(seed=1), picture(seed=2)]


def random_bytes(count: int) -> bytes:
    """Pseudo-random bytes, the same each time."""
    return epoch_order(pack_key(TRAINING, 1), 0, count).astype(np.uint8).tobytes()


# Name to (content, kinds that `check-data` must find, in their order). Those of severity "kills" end a training.
FILES: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "fine.jpg": (jpeg, []),
    "grey.jpg": (lambda: encode(picture().convert("L"), "JPEG"), []),
    "progressive.JPEG": (lambda: jpeg(progressive=True), []),
    "trailing_garbage.jpg": (lambda: jpeg() + random_bytes(5000), []),
    "one_pixel.jpg": (lambda: encode(picture(1, 1), "JPEG"), []),
    "palette_alpha.png": (palette_with_alpha, []),
    "alpha.png": (lambda: encode(picture().convert("RGBA"), "PNG"), []),
    "one_bit.png": (lambda: encode(picture().convert("1"), "PNG"), []),
    "lossless.webp": (lambda: encode(picture(), "WEBP", lossless=True), []),
    "plain.bmp": (lambda: encode(picture(), "BMP"), []),
    "plain.tif": (lambda: encode(picture(), "TIFF"), []),
    "plain.ppm": (lambda: encode(picture(), "PPM"), []),
    "upright.jpg": (lambda: jpeg(exif=exif(1)), []),
    "UPPER CASE, spaces & ümläut.JPG": (jpeg, []),
    # harmless, but worth a note
    "cmyk.jpg": (lambda: encode(picture().convert("CMYK"), "JPEG"), ["cmyk"]),
    "sixteen_bits.png": (lambda: encode(picture().convert("I;16"), "PNG"), ["deep"]),
    "png_inside.JPEG": (lambda: encode(picture(), "PNG"), ["wrong_extension"]),
    "webp_inside.JPEG": (lambda: encode(picture(), "WEBP"), ["wrong_extension"]),
    "bmp_inside.jpg": (lambda: encode(picture(), "BMP"), ["wrong_extension"]),
    "very_wide.jpg": (lambda: encode(picture(20000, 1), "JPEG"), ["thin"]),
    "very_high.jpg": (lambda: encode(picture(2, 20000), "JPEG"), ["thin"]),
    "stereo.jpg": (lambda: encode(picture(), "MPO", save_all=True, append_images=frames()), ["several_frames"]),
    "animated.webp": (lambda: encode(picture(), "WEBP", save_all=True, append_images=frames()), ["several_frames"]),
    "zeroed_middle.jpg": (lambda: with_middle(jpeg(), bytes(600)), ["damaged"]),
    "header_too_high.jpg": (lambda: with_size(jpeg(), 96, 6000), ["damaged"]),
    "corrupt_huffman.jpg": (lambda: with_middle(jpeg(), b"\xff\x00" * 300), ["damaged"]),
    # changes a result
    "rotated.jpg": (lambda: jpeg(exif=exif(6)), ["rotated"]),
    "mirrored.png": (lambda: encode(picture(), "PNG", exif=exif(2)), ["rotated"]),
    # ends a run
    "empty.jpg": (lambda: b"", ["empty"]),
    "cut_in_header.jpg": (lambda: jpeg()[:100], ["truncated"]),
    "cut_half_way.jpg": (lambda: jpeg()[: len(jpeg()) // 2], ["truncated"]),
    "cut_last_bytes.jpg": (lambda: jpeg()[:-2], ["truncated"]),
    "cut_progressive.jpg": (lambda: jpeg(progressive=True)[:-300], ["truncated"]),
    "cut.png": (lambda: encode(picture(), "PNG")[:-3000], ["truncated"]),
    "garbage.jpg": (lambda: random_bytes(4000), ["not_an_image"]),
    "zeros.jpg": (lambda: bytes(4000), ["not_an_image"]),
    "text.jpg": (lambda: b"a picture of a cat\n", ["not_an_image"]),
    "error_page.jpg": (lambda: PAGE, ["not_an_image"]),
    "gif_inside.JPEG": (lambda: encode(picture(), "GIF"), ["gif"]),
    "animated_gif.jpg": (lambda: encode(picture(), "GIF", save_all=True, append_images=frames()), ["gif"]),
    "bomb.png": (png_bomb, ["too_large"]),
    "giant_header.jpg": (lambda: with_size(jpeg(), 65000, 65000), ["too_large"]),
}
# Not regular files; `link_loop.jpg` is a symbolic link to itself.
OTHERS = {
    "pipe.JPEG": ["special"],
    "device.jpg": ["special"],
    "dangling.jpg": ["unreadable"],
    "link_loop.jpg": ["unreadable"],
}


def write_files(folder: Path) -> dict[Path, list[str]]:
    """Write FILES into a folder; returns the kinds of finding of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content())
    return {folder / name: kinds for name, (_, kinds) in FILES.items()}


def write_others(folder: Path) -> dict[Path, list[str]]:
    """Make OTHERS in a folder, and a folder whose name is an image's; returns the kinds of finding of each."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "pipe.JPEG")
    (folder / "device.jpg").symlink_to("/dev/null")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "link_loop.jpg").symlink_to("link_loop.jpg")
    (folder / "folder.JPEG").mkdir()
    (folder / "folder.JPEG" / "inside.jpg").write_bytes(jpeg(seed=3))
    return {folder / name: kinds for name, kinds in OTHERS.items()} | {folder / "folder.JPEG" / "inside.jpg": []}
