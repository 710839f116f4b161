"""CelebA, aligned and cropped: img_align_celeba (zip or folder) with its lists of attributes and of splits."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ali_dist.data.files import FileMembers, Files
from ali_dist.data.images import Images, Unreadable
from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SIZE = 64
ALIGNED = (178, 218)  # width and height of the official images
RESIZED, TOP = (64, 78), 7  # the authors' resizing, and the first of the 64 rows they keep
SPLITS = ("train", "valid", "test")  # by their numbers in the list
ATTRIBUTES = 40
LISTS = ("list_attr_celeba.txt", "list_eval_partition.txt")


def open_celeba(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """The official splits, in the order of the list; attributes are 1 where the file says 1 and 0 where it says -1.

    `source` is a folder with the two lists and img_align_celeba.zip or img_align_celeba/, in it or one level below.
    Other files of the official release (identities, landmarks, boxes) may lie there and are not read.
    """
    attr, partition = (_find(source, name) for name in LISTS)
    images = Files(_find(source, "img_align_celeba.zip", "img_align_celeba"))
    folders = {name.rpartition("/")[2]: name for name in images.names if name.endswith(".jpg")}
    names, values = _attributes(attr)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, line in enumerate(_lines(partition), 1):
        match line.split():
            case [image, "0" | "1" | "2" as split] if image in values:
                splits[SPLITS[int(split)]].append(image)
            case _:
                raise UserError(f"{partition}, line {number}: {line[:60]!r} is no image of {attr.name} and 0, 1 or 2")
    opened = {}
    for split, listed in splits.items():
        labels = np.array([values[image] for image in listed], np.uint8).reshape(-1, ATTRIBUTES)
        # An image that is listed but not there is looked for under the list's name, and is reported so
        opened[split] = Images(FileMembers(images, (folders.get(image, image) for image in listed)), labels, fit)
    return OpenSource(classes=(), attributes=names, splits=opened)


def fit(image: Image.Image) -> Image.Image:
    """178x218 to 64x78 by Lanczos, then rows 7 to 70; Unreadable for an image of another size."""
    if image.size != ALIGNED:
        raise Unreadable(f"is {image.width}x{image.height}, not {ALIGNED[0]}x{ALIGNED[1]}")
    return image.resize(RESIZED, Image.Resampling.LANCZOS).crop((0, TOP, SIZE, TOP + SIZE))


def _find(source: Path, *names: str) -> Path:
    """The first of the names in the folder or one below it."""
    if source.is_dir():
        for name in names:
            for path in (source / name, *sorted(source.glob(f"*/{name}"))):
                if path.exists():
                    return path
    raise UserError(
        f"--source {source} must be a folder with img_align_celeba.zip, {' and '.join(LISTS)}: {names[0]} is not there"
    )


def _attributes(path: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The attributes' names, and each image's as uint8 [40]. The file: a count, the names, a line an image."""
    lines = _lines(path)
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    if len(names) != ATTRIBUTES:
        raise UserError(f"{path} names {len(names)} attributes in its second line instead of {ATTRIBUTES}")
    values = {}
    for number, line in enumerate(lines[2:], 3):
        image, *words = line.split()
        if len(words) != ATTRIBUTES or not {"1", "-1"}.issuperset(words):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not a name and {ATTRIBUTES} times 1 or -1")
        values[image] = np.array([word == "1" for word in words], np.uint8)
    if lines[0].strip() != str(len(values)):
        raise UserError(f"{path} says it lists {lines[0][:20]} images and lists {len(values):,}: fetch it again")
    return names, values


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
