"""ImageNet at 64x64: ILSVRC2012's archives or class folders, or the published batches of 64x64 images."""

import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from ali_dist.data.files import FileMembers, Files, TarMembers, scan_tar
from ali_dist.data.imagenet64_batches import is_downsampled, open_batches
from ali_dist.data.images import Images, shorter_side_crop
from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SIZE = 64
TRAIN, VALID = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SYNSETS = "imagenet_2012_validation_synset_labels.txt"  # the same list, by WordNet IDs
WNID = re.compile(r"n\d{8}")


def open_imagenet64(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """Labels are the classes' places among the sorted WordNet IDs; images go by file name within each class.

    `source` is a folder with ILSVRC2012_img_train.tar or train/ (a folder a class) and ILSVRC2012_img_val.tar or
    val/ (a folder a class, or flat). A flat validation set needs the list of its classes: the development kit,
    packed or unpacked, or a text file of WordNet IDs. Or a folder with the batches of the published 64x64 images.
    """
    if not source.is_dir():
        raise UserError(f"--source {source} must be the folder that holds {TRAIN}, {VALID} and {DEVKIT}.tar.gz")
    if is_downsampled(source):
        return open_batches(source)
    fit = partial(shorter_side_crop, size=SIZE)
    train, wnids = _train(source)
    classes = np.unique(wnids)
    kit = _Devkit(source)
    valid, valid_wnids = _valid(source, kit)
    labels = np.searchsorted(classes, valid_wnids)
    unknown = classes[np.minimum(labels, len(classes) - 1)] != valid_wnids
    if unknown.any():
        raise UserError(f"{source}: validation images are of class {valid_wnids[unknown][0]}, which is not in training")
    return OpenSource(
        classes=tuple(kit.words.get(str(wnid), str(wnid)) for wnid in classes),
        splits={"train": Images(train, np.searchsorted(classes, wnids), fit), "valid": Images(valid, labels, fit)},
    )


def _train(source: Path) -> tuple[TarMembers | FileMembers, np.ndarray]:
    """The training images by class and name, and the WordNet ID of each."""
    path = source / TRAIN
    if not path.exists():
        return _class_folders(source, "train")
    archives = sorted(scan_tar(path))
    for name, _, _ in archives:
        if not re.fullmatch(rf"{WNID.pattern}\.tar", name):
            raise UserError(f"{path} holds {name}, which is no class's archive: is it ILSVRC2012's?")
    counts = []

    def images() -> Iterator[tuple[str, int, int]]:
        for _, offset, _ in archives:
            found = sorted(scan_tar(path, offset))
            counts.append(len(found))
            yield from found

    members = TarMembers(path, images())
    return members, np.repeat(np.array([name[:9] for name, _, _ in archives], "<U9"), counts)


def _valid(source: Path, kit: "_Devkit") -> tuple[TarMembers | FileMembers, np.ndarray]:
    """The validation images by name, and the WordNet ID of each."""
    path = source / VALID
    if path.exists():
        found = sorted(scan_tar(path))
        return TarMembers(path, found), kit.truth(len(found))
    flat = [] if not (source / "val").is_dir() else [p.name for p in (source / "val").iterdir() if p.is_file()]
    flat = sorted(name for name in flat if name.endswith(".JPEG"))
    if flat:
        return FileMembers(Files(source / "val"), flat), kit.truth(len(flat))
    return _class_folders(source, "val")


def _class_folders(source: Path, name: str) -> tuple[FileMembers, np.ndarray]:
    folder, archive = source / name, TRAIN if name == "train" else VALID
    if not folder.is_dir():
        raise UserError(f"{source} has neither {archive} nor {name}/: fetch it from https://image-net.org/download")
    files = Files(folder)
    rows = [file.split("/") for file in files.names]
    rows = [row for row in rows if len(row) == 2 and WNID.fullmatch(row[0]) and row[1].endswith(".JPEG")]
    # Training goes by class, validation by the images' numbers, as in the archives
    rows.sort(key=None if name == "train" else lambda row: row[1])
    return FileMembers(files, map("/".join, rows)), np.array([wnid for wnid, _ in rows], "<U9")


class _Devkit:
    """The development kit, or as much of it as there is: `words` are the classes' names by WordNet ID."""

    def __init__(self, source: Path) -> None:
        self.source, self.ids = source, {}
        self.words: dict[str, str] = {}
        self.files = self._read(source)
        if META in self.files:
            self._read_meta(self.files[META])

    def truth(self, count: int) -> np.ndarray:
        """The WordNet ID of each of the `count` validation images, in the order of their names."""
        for name in (TRUTH, SYNSETS):
            if name in self.files:
                break
        else:
            raise UserError(f"{self.source} has no {DEVKIT}.tar.gz, {TRUTH} or {SYNSETS}: the classes of its images")
        lines = self.files[name].decode("ascii", "replace").split("\n")
        words = [line.split()[-1] for line in lines if line.strip()]  # a file's name may stand before its class
        if len(words) != count:
            raise UserError(f"{self.source}: {name} has {len(words):,} lines for {count:,} validation images")
        unknown = next((word for word in words if not WNID.fullmatch(word) and word not in self.ids), None)
        if unknown is not None:
            hint = "" if self.ids else f", and {META} of {DEVKIT}, which explains numbers, is not there"
            raise UserError(f"{self.source}: {name} has {unknown[:20]!r}, which is no class{hint}")
        return np.array([self.ids.get(word, word) for word in words], "<U9")

    @staticmethod
    def _read(source: Path) -> dict[str, bytes]:
        """The files that matter by name, from the kit's archive or from a folder."""
        archive, files = source / f"{DEVKIT}.tar.gz", {}
        try:
            if archive.exists():
                with tarfile.open(archive, "r:gz") as kit:
                    for member in kit:
                        if member.isreg() and Path(member.name).name in (TRUTH, META):
                            files[Path(member.name).name] = kit.extractfile(member).read()
            for folder in (source / DEVKIT / "data", source / DEVKIT, source):
                for name in (TRUTH, META, SYNSETS):
                    if name not in files and (folder / name).is_file():
                        files[name] = (folder / name).read_bytes()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{archive} is damaged: fetch it again ({error})") from error
        return files

    def _read_meta(self, data: bytes) -> None:
        """A table with ILSVRC2012_ID, WNID, words and num_children, and more; classes are those without children."""
        from scipy.io import loadmat  # slow to import; it builds arrays, and calls nothing that a file names

        try:
            synsets = loadmat(BytesIO(data), squeeze_me=True)["synsets"]
            for number, wnid, words, children in zip(
                *(synsets[field] for field in ("ILSVRC2012_ID", "WNID", "words", "num_children")), strict=True
            ):
                if not int(children) and WNID.fullmatch(str(wnid)):
                    self.ids[str(int(number))] = str(wnid)
                    self.words[str(wnid)] = str(words)
        # A damaged file can raise nearly anything
        except Exception as error:
            raise UserError(f"{self.source}: {META} is damaged: fetch {DEVKIT} again ({error})") from error
