"""tiny-imagenet-200: 200 classes of 64x64 JPEG images, from its zip archive or the unpacked folder."""

import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SIZE = 64


class Files:
    """The files below tiny-imagenet-200/, in a zip archive or a folder, by relative name."""

    def __init__(self, source: Path) -> None:
        self.source = source
        try:
            self.archive = None if source.is_dir() else zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{source} is no zip archive or is cut short: fetch it again ({error})") from error
        if self.archive is None:
            self.root = source if (source / "wnids.txt").exists() else source / "tiny-imagenet-200"
            names = (path.relative_to(self.root).as_posix() for path in sorted(self.root.rglob("*")))
            self.names = {name: self.root / name for name in names}
        else:
            tops = (name.partition("/") for name in self.archive.namelist())
            self.names = {rest: top + slash + rest for top, slash, rest in tops if rest}

    def read(self, name: str) -> bytes:
        if name not in self.names:
            raise UserError(f"{self.source} has no file {name}: is it tiny-imagenet-200, and whole? fetch it again")
        try:
            if self.archive is None:
                return self.names[name].read_bytes()
            return self.archive.read(self.names[name])
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.source}: {name} is damaged: fetch it again ({error})") from error

    def lines(self, name: str) -> list[str]:
        return self.read(name).decode("utf-8", "replace").splitlines()


class Images:
    """Labelled JPEG files, decoded on access."""

    def __init__(self, files: Files, labelled: list[tuple[str, int]]) -> None:
        self.files, self.labelled = files, labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        name, label = self.labelled[i]
        data = self.files.read(name)
        try:
            with Image.open(BytesIO(data), formats=["JPEG"]) as image:
                x = np.asarray(image.convert("RGB"))
        # Pillow raises many kinds of error on damaged files
        except Exception as error:
            raise UserError(
                f"{self.files.source}: {name} is no readable JPEG image: fetch it again ({error})"
            ) from error
        if x.shape != (SIZE, SIZE, 3):
            raise UserError(f"{self.files.source}: {name} is {x.shape[1]}x{x.shape[0]}, not {SIZE}x{SIZE}")
        return x.transpose(2, 0, 1), label


def open_tinyimagenet(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """Labels follow the order of wnids.txt. The official test images have no labels and are left out."""
    files = Files(source)
    wnids = [line.strip() for line in files.lines("wnids.txt") if line.strip()]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    words = {}
    if "words.txt" in files.names:
        words = dict(line.split("\t", 1) for line in files.lines("words.txt") if "\t" in line)
    train = []
    for name in files.names:
        match name.split("/"):
            case ["train", wnid, "images", image] if wnid in label_of and image.endswith(".JPEG"):
                train.append((name, label_of[wnid]))
    valid = []
    for line in files.lines("val/val_annotations.txt"):
        image, wnid = (line.split("\t") + [""])[:2]
        if wnid not in label_of:
            raise UserError(f"{source}: val/val_annotations.txt is damaged at {line[:40]!r}: fetch it again")
        valid.append((f"val/images/{image}", label_of[wnid]))
    return OpenSource(
        classes=tuple(words.get(wnid, wnid) for wnid in wnids),
        splits={"train": Images(files, sorted(train)), "valid": Images(files, valid)},
    )
