"""tiny-imagenet-200: 200 classes of 64x64 JPEG images, from its zip archive or the unpacked folder."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ali_dist.data.files import FileMembers, Files
from ali_dist.data.images import Images, Unreadable
from ali_dist.data.types import UNLABELLED, OpenSource
from ali_dist.recipe import UserError

SIZE = 64


def open_tinyimagenet(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """Labels follow the order of wnids.txt; the official test images have none: the split `unlabelled`, labels -1."""
    files = Files(source)
    root = min((name for name in files.names if name.endswith("wnids.txt")), key=len, default="").removesuffix(
        "wnids.txt"
    )

    def lines(name: str) -> list[str]:
        if root + name not in files.names:
            raise UserError(f"{source} has no file {name}: is it tiny-imagenet-200, and whole? fetch it again")
        return files.lines(root + name)

    wnids = [line.strip() for line in lines("wnids.txt") if line.strip()]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    words = {}
    if root + "words.txt" in files.names:
        words = dict(line.split("\t", 1) for line in lines("words.txt") if "\t" in line)
    train, unlabelled = [], []
    for name in files.names:
        match name.removeprefix(root).split("/"):
            case ["train", wnid, "images", image] if wnid in label_of and image.endswith(".JPEG"):
                train.append((name, label_of[wnid]))
            case ["test", "images", image] if image.endswith(".JPEG"):
                unlabelled.append((name, UNLABELLED))
    valid = []
    for line in lines("val/val_annotations.txt"):
        image, wnid = (line.split("\t") + [""])[:2]
        if wnid not in label_of:
            raise UserError(f"{source}: val/val_annotations.txt is damaged at {line[:40]!r}: fetch it again")
        valid.append((f"{root}val/images/{image}", label_of[wnid]))
    return OpenSource(
        classes=tuple(words.get(wnid, wnid) for wnid in wnids),
        splits={
            "train": _images(files, train),
            "valid": _images(files, valid),
            "unlabelled": _images(files, unlabelled),
        },
    )


def fit(image: Image.Image) -> Image.Image:
    """As it is; Unreadable for an image of another size."""
    if image.size != (SIZE, SIZE):
        raise Unreadable(f"is {image.width}x{image.height}, not {SIZE}x{SIZE}")
    return image


def _images(files: Files, rows: list[tuple[str, int]]) -> Images:
    return Images(FileMembers(files, (name for name, _ in rows)), np.array([label for _, label in rows], np.int64), fit)
