"""scikit-learn's digits: 1,797 grey images of 8x8, which come with the library."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ali_dist.data.types import OpenSource

SIZE = 32


class Digits:
    """Images of values 0 to 16, scaled to 0 to 255 and enlarged to 32x32 by bicubic interpolation."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        small = Image.fromarray(np.rint(self.images[i] * (255 / 16)).astype(np.uint8))
        return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[None], int(self.labels[i])


def open_digits(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """Every fifth image is for validation, the others for training; there is no source to give."""
    from sklearn.datasets import load_digits  # slow to import, and the table imports this file

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    splits = {"train": ~held_out, "valid": held_out}
    return OpenSource(
        classes=tuple(str(name) for name in digits.target_names),
        splits={name: Digits(digits.images[rows], digits.target[rows]) for name, rows in splits.items()},
        serial=True,
    )
