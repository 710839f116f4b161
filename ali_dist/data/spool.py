"""Images that an archive only gives in its own order, kept in a temporary file for reading in any other."""

import os
import tempfile

import numpy as np

from ali_dist.recipe import UserError


class Spool:
    """A split whose images lie raw in an unnamed temporary file (in $TMPDIR), so memory holds one at a time.

    `y` int64 [n] is set by whoever writes the images.
    """

    def __init__(self, stored: tuple[int, ...], axes: tuple[int, int, int] = (0, 1, 2)) -> None:
        """`stored`: shape of an image as it is written, uint8; `axes`: which of its axes are C, H and W."""
        self.stored, self.axes, self.y = stored, axes, np.empty(0, np.int64)
        self.bytes = int(np.prod(stored))
        self.file = tempfile.TemporaryFile()

    def write(self, data: bytes) -> None:
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            message = f"cannot write a temporary file to {tempfile.gettempdir()} ({error.strerror})"
            raise UserError(f"{message}: set TMPDIR to a folder with more room") from error

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        data = os.pread(self.file.fileno(), self.bytes, i * self.bytes)
        return np.frombuffer(data, np.uint8).reshape(self.stored).transpose(self.axes), int(self.y[i])
