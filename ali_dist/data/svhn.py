"""SVHN, format 2 (cropped digits): train_32x32.mat, extra_32x32.mat and test_32x32.mat in a folder."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ali_dist.data.matlab import CHUNK, Variable, variables
from ali_dist.data.spool import Spool
from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SIZE = 32
FILES = {"train": "extra_32x32.mat", "valid": "train_32x32.mat", "test": "test_32x32.mat"}


def open_svhn(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """As in the paper, "extra" is for training and "train" for validation. The files' label 10 is the digit 0.

    The images are unpacked to a temporary file, as a compressed array can only be read from its beginning.
    """
    if not source.is_dir():
        raise UserError(f"--source {source} must be the folder that holds {', '.join(FILES.values())}")
    paths = {split: source / name for split, name in FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{source} has no file {path.name}: fetch it from http://ufldl.stanford.edu/housenumbers/")
    splits = {split: _read(path) for split, path in paths.items()}
    return OpenSource(classes=tuple("0123456789"), splits=splits, serial=True)


def _read(path: Path) -> Spool:
    """X is uint8 [32, 32, 3, n] in Fortran's order, so that the file holds image after image, each as [C, W, H]."""
    images, found = Spool((3, SIZE, SIZE), (0, 2, 1)), {}
    try:
        for variable in variables(path):
            if variable.name == "X":
                found["X"] = _spool(variable, images)
            elif variable.name == "y":
                labels = variable.array().ravel()
                found["y"] = len(labels)
                images.y = labels.astype(np.int64) % 10
                if not np.isin(labels, range(1, 11)).all():
                    raise ValueError("it has labels outside 1..10")
            else:
                raise ValueError(f"it holds {variable.name!r}")
        if found.keys() != {"X", "y"} or found["X"] != found["y"]:
            raise ValueError(f"it has {found.get('X', 0):,} images and {found.get('y', 0):,} labels")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not SVHN's format 2: fetch it again ({error})") from error
    return images


def _spool(variable: Variable, images: Spool) -> int:
    """Copies X's images to the temporary file; how many they are."""
    if variable.shape[:3] != (SIZE, SIZE, 3) or len(variable.shape) != 4 or variable.dtype != np.uint8:
        raise ValueError(f"X is {variable.dtype}{list(variable.shape)} instead of uint8[32, 32, 3, n]")
    left = variable.bytes
    while left:
        chunk = min(CHUNK, left)
        images.write(variable.read(chunk))
        left -= chunk
    return variable.shape[3]
