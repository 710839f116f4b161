import struct
import zlib

import numpy as np
import pytest
from archives import open_small, svhn_arrays
from scipy.io import loadmat, savemat

from ali_dist.data import matlab
from ali_dist.recipe import UserError

FILES = {"train": ("extra_32x32.mat", 21), "valid": ("train_32x32.mat", 9), "test": ("test_32x32.mat", 5)}
COUNTS = {split: count for split, (_, count) in FILES.items()}


def write_svhn(folder, compressed=True, y_type=np.uint8):
    for seed, (name, count) in enumerate(FILES.values()):
        x, y = svhn_arrays(count, seed)
        savemat(folder / name, {"X": x, "y": y.astype(y_type)}, do_compression=compressed)
    return folder


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("y_type", [np.uint8, np.float64])
@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_images_and_digits(tmp_path, monkeypatch, compressed, y_type, chunk):
    monkeypatch.setattr(matlab, "CHUNK", chunk)
    write_svhn(tmp_path, compressed, y_type)
    opened = open_small("svhn", tmp_path, **COUNTS)
    assert opened.classes == tuple("0123456789") and opened.serial
    for split, (name, count) in FILES.items():
        official = loadmat(tmp_path / name)
        digits = official["y"].ravel().astype(int)
        assert 10 in digits or split == "test"
        for i in list(range(count))[::-1]:
            x, y = opened.splits[split][i]
            assert y == digits[i] % 10
            assert x.dtype == np.uint8 and (x == official["X"][:, :, :, i].transpose(2, 0, 1)).all()


def damaged(path, edit):
    path.write_bytes(edit(bytearray(path.read_bytes())))


def flip(data, at):
    data[at] ^= 0xFF
    return data


def element(name, shape, numbers, kind=2, flags=9):
    """An uncompressed array as the format writes it."""

    def part(kind, content):
        return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)

    content = part(6, struct.pack("<II", flags, 0)) + part(5, struct.pack(f"<{len(shape)}i", *shape))
    content += part(1, name) + part(kind, numbers)
    return struct.pack("<II", 14, len(content)) + content


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda d: d[:-700], "cut short"),
        (lambda d: d[:100], "no little-endian MATLAB 5.0 file"),
        (lambda d: b"<html>404</html>", "no little-endian MATLAB 5.0 file"),
        (lambda d: b"", "no little-endian MATLAB 5.0 file"),
        (lambda d: d[:128], "0 images and 0 labels"),
        (lambda d: flip(d, len(d) // 2), ""),
        (lambda d: HEADER + element(b"X", (32, 32, 3, 1), bytes(3072)), "1 images and 0 labels"),
        (lambda d: HEADER + element(b"X", (32, 32, 3, 2), bytes(3072)), "shape .* has 3072 bytes"),
        (lambda d: HEADER + element(b"X", (28, 28, 3, 1), bytes(2352)), "instead of uint8"),
        (lambda d: HEADER + element(b"X", (32, 32, 3, -1), b""), "shape"),
        (lambda d: HEADER + element(b"X", (32, 32, 3, 1), bytes(3072), flags=1), "no array of real numbers"),
        (lambda d: HEADER + element(b"y", (2, 1), b"\x01\x0b"), "labels outside 1..10"),
        (lambda d: HEADER + element(b"evil", (2, 1), b"\x01\x0b"), "it holds 'evil'"),
        (lambda d: HEADER + struct.pack("<II", 17, 0), "an element of type 17"),
        (lambda d: HEADER + struct.pack("<II", 15, 20) + zlib.compress(bytes(8))[:20], ""),
    ],
)
def test_damaged_files(tmp_path, edit, complaint):
    write_svhn(tmp_path)
    damaged(tmp_path / "train_32x32.mat", edit)
    with pytest.raises(
        UserError, match=f"train_32x32.mat is damaged or not SVHN's format 2: fetch it again .*{complaint}"
    ):
        open_small("svhn", tmp_path, **COUNTS)


def test_a_compressed_file_is_held_against_its_checksum(tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    data = path.read_bytes()
    size = struct.unpack("<I", data[132:136])[0]  # of the first element, X
    stored = zlib.compressobj(0)  # stored, so that a changed byte is a changed pixel and nothing else
    packed = bytearray(stored.compress(zlib.decompress(data[136 : 136 + size])) + stored.flush())
    packed[2000] ^= 1
    path.write_bytes(data[:128] + struct.pack("<II", 15, len(packed)) + packed + data[136 + size :])
    with pytest.raises(UserError, match="test_32x32.mat is damaged .*incorrect data check"):
        open_small("svhn", tmp_path, **COUNTS)


def test_missing_files(tmp_path):
    write_svhn(tmp_path)
    with pytest.raises(UserError, match="train_32x32.mat must be the folder that holds extra_32x32.mat"):
        open_small("svhn", tmp_path / "train_32x32.mat")
    (tmp_path / "extra_32x32.mat").unlink()
    with pytest.raises(UserError, match="has no file extra_32x32.mat: fetch it from http"):
        open_small("svhn", tmp_path)


def test_no_room_for_the_temporary_file(tmp_path, monkeypatch):
    write_svhn(tmp_path)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("ali_dist.data.spool.tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=r"cannot write a temporary file to .* \(No space .*set TMPDIR"):
        open_small("svhn", tmp_path)
