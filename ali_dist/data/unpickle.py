"""Official archives' pickles without their objects: nothing that a file names is ever looked up or called."""

import pickle
import re
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np


def load(file: BinaryIO | bytes) -> dict[str, Any]:
    """The pickled dict, with text keys; its arrays are read-only numpy arrays of numbers.

    Raises pickle.UnpicklingError for a file that asks for anything but dicts, lists, strings, bytes, numbers and
    arrays of numbers, and whatever a damaged pickle raises.
    """
    tree = SafeUnpickler(BytesIO(file) if isinstance(file, bytes) else file, encoding="latin1").load()
    return {text(key): value.value if isinstance(value, _Array) else value for key, value in tree.items()}


class SafeUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings, bytes, numbers, and arrays by a stand-in; anything else is an error.

    No function or class named in the file is ever looked up, so a hostile file has nothing to call.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image archive needs") from None


def text(word: str | bytes) -> str:
    """A word of a pickle by Python 2 or 3."""
    return word.decode("latin1") if isinstance(word, bytes) else word


class _Dtype:
    """numpy.dtype: only numbers are understood."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if not re.fullmatch(r"[|<>=]?[biuf][1248]", text(code)):
            raise pickle.UnpicklingError(f"an array of {code!r}, which are no numbers")
        self.value = np.dtype(text(code))

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(text(state[1]))


class _Array:
    """numpy.ndarray: `value` is the array once the state is known."""

    def __init__(self, *_: object) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran_order else "C")


def _encode(word: str, encoding: str) -> bytes:
    """_codecs.encode, by which Python 3 writes bytes in protocol 2."""
    if text(encoding) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return word.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
