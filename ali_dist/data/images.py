"""Image files to pixels: the one place where it is decided what becomes of unusual ones.

| file | becomes | kind |
| --- | --- | --- |
| grey, with or without alpha, or black and white | three equal channels | grey |
| palette | its colours | palette |
| CMYK | RGB by Pillow's plain formula, Adobe's inverted files too | cmyk |
| with transparency | the colours as stored, transparency ignored | alpha |
| 16 bits a channel, grey | the high byte (Pillow does the same to colours, unnoticed) | 16-bit |
| EXIF orientation | turned upright | rotated |
| several frames | the first one | animated |
| truncated, empty, no image, over Pillow's limit of pixels | an `Unreadable` | |
"""

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ali_dist.data.types import BadImage, Sample

# None of these runs a program to decode, as Pillow's EPS does
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PLAIN_MODES = {"RGB": (), "L": ("grey",), "1": ("grey",), "P": ("palette",), "CMYK": ("cmyk",), "YCbCr": ()}
ALPHA_MODES = {"RGBA": ("alpha",), "LA": ("grey", "alpha"), "PA": ("palette", "alpha"), "RGBa": ("alpha",)}
MAX_ASPECT = 100
ORIENTATION = 0x0112  # the EXIF tag


class Unreadable(Exception):
    """A file that gives no image; the text says why."""


class Members(Protocol):
    """Files of one source by index; `read` raises BadImage for one that cannot be had."""

    source: Path

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...

    def read(self, i: int) -> bytes: ...


class Images:
    """A split of image files, decoded on access: `labels` is int64 [n] or uint8 [n, A], `fit` gives the final size."""

    def __init__(self, members: Members, labels: np.ndarray, fit: Callable[[Image.Image], Image.Image]) -> None:
        self.members, self.labels, self.fit = members, labels, fit

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Sample:
        name, y = self.members.name(i), self.labels[i]
        data = self.members.read(i)
        try:
            image, odd = decode(data)
            x = to_array(self.fit(image))
        except Unreadable as error:
            raise BadImage(self.members.source, name, str(error)) from error
        return Sample(x, y if y.ndim else int(y), odd, name)


def decode(data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame of an image file as an upright RGB image, and the kinds of conversion it took.

    Unreadable when the file is empty, cut short, or of no known format.
    """
    if not data:
        raise Unreadable("is empty")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(data), formats=FORMATS) as image:
            animated = getattr(image, "is_animated", False)
            image.load()
            image, odd = _to_rgb(image)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("is no image of a known format") from error
    # Pillow raises many kinds of error on damaged files
    except Exception as error:
        raise Unreadable(f"is no readable image ({error or type(error).__name__})") from error
    return image, odd + ("animated",) * animated


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [3, H, W] of an RGB image."""
    return np.asarray(image).transpose(2, 0, 1)


def shorter_side_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size` (Lanczos), the longer in proportion, rounded down; then the centre square.

    Unreadable for a sliver, whose enlargement would need memory without bound.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        raise Unreadable(f"is {width}x{height}, too narrow for a square of it to mean anything")
    width, height = size * width // short, size * height // short
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + size, top + size))


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    turned = _is_turned(image)
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise Unreadable("has more than 16 bits a pixel")
        image, odd = Image.fromarray((values >> 8).astype(np.uint8)), ("grey", "16-bit")
    elif image.mode in PLAIN_MODES:
        odd = PLAIN_MODES[image.mode] + ("alpha",) * ("transparency" in image.info)
    elif image.mode in ALPHA_MODES:
        odd = ALPHA_MODES[image.mode]
    else:
        raise Unreadable(f"has pixels of mode {image.mode}, which no rule covers")
    image.info.pop("transparency", None)
    return image.convert("RGB"), odd + ("rotated",) * turned


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    # An unreadable EXIF block turns nothing
    except Exception:
        return False
