"""Any images of one's own: a folder or zip in ImageFolder's layout, one folder of images a class."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ali_dist.data.files import FileMembers, Files
from ali_dist.data.images import SUFFIXES, Images, shorter_side_crop
from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SIZE = 64
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}  # folder -> split
SEED = 0  # of the order of the images not to train on
HELD_OUT = 10  # where there is no folder for validation, every tenth image


def open_folder(source: Path | None, counts: Mapping[str, int], size: int = SIZE) -> OpenSource:
    """Images of `size` pixels: the shorter side resized, then the centre.

    With a folder train/ in it, the source is split: train/, valid/ or val/, and test/ hold a folder a class each.
    Without, it holds the classes' folders itself. Images in no folder at all are one class. Where nothing is for
    validation, every tenth training image, by name, is. One folder around everything, as archives have, is looked
    through; files without an image's suffix are left aside.
    """
    files = Files(source)
    names = [name for name in files.names if name.lower().endswith(SUFFIXES) and not _is_hidden(name)]
    if not names:
        raise UserError(
            f"{source} holds no images: none of its {len(files.names):,} files ends in {' '.join(SUFFIXES)}"
        )
    root = _root(names)
    is_split = any(name.startswith(f"{root}train/") for name in names)
    found: dict[str, list[tuple[str, str]]] = {"train": [], "valid": []}
    for name in names:
        folder, _, rest = name.removeprefix(root).partition("/") if is_split else ("train", "/", name[len(root) :])
        if folder not in SPLITS:
            raise UserError(f"{source}: {name} lies beside {root}train/, in none of {'/, '.join(SPLITS)}/: move it")
        found.setdefault(SPLITS[folder], []).append((name, rest.partition("/")[0] if "/" in rest else ""))
    if not found["valid"]:
        found["valid"] = found["train"][::HELD_OUT]
        found["train"] = [row for i, row in enumerate(found["train"]) if i % HELD_OUT]
    # Names go by class, and the first images of a split stand for all of it; training is shuffled for every data set
    for split in found.keys() - {"train"}:
        rows = found[split]
        found[split] = [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))]
    classes = _classes(source, found)
    label_of = {name: label for label, name in enumerate(classes)}
    fit = partial(shorter_side_crop, size=size)
    splits = {
        split: Images(FileMembers(files, (name for name, _ in rows)), np.array([label_of[c] for _, c in rows]), fit)
        for split, rows in found.items()
    }
    return OpenSource(classes=tuple(name or "image" for name in classes), splits=splits)


def _root(names: list[str]) -> str:
    """The one folder around all class folders, with its slash, or nothing."""
    tops = {name.partition("/")[0] for name in names}
    if len(tops) == 1 and "train" not in tops and all(name.count("/") > 1 for name in names):
        return tops.pop() + "/"
    return ""


def _classes(source: Path, found: Mapping[str, list[tuple[str, str]]]) -> list[str]:
    """The training images' classes, by name; UserError when the splits do not agree with each other."""
    classes = {name for _, name in found["train"]}
    if not classes:
        raise UserError(f"{source} holds too few images: at least two are needed, one of them for validation")
    everything = [row for rows in found.values() for row in rows]
    lost = next((name for name, folder in everything if not folder), None)
    if lost and any(folder for _, folder in everything):
        raise UserError(f"{source}: {lost} is in no class folder, but others are: move it into one")
    for name, folder in everything:
        if folder not in classes:
            raise UserError(f"{source}: {name} is of class {folder!r}, of which there is no image to train on")
    return sorted(classes)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
