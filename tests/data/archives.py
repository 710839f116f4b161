"""Image files of every unusual kind, and small archives in the official layouts."""

import io
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ali_dist.data.pack import check_counts
from ali_dist.data.table import DATASETS
from ali_dist.data.types import OpenSource


def picture(seed: int, width: int = 80, height: int = 60, mode: str = "RGB") -> Image.Image:
    """A smooth random image, so that JPEG changes it little."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "PNG", exif=exif)


def deep(seed: int = 0, width: int = 80, height: int = 60) -> np.ndarray:
    """uint16 [height, width]."""
    return np.random.default_rng(seed).integers(0, 65536, (height, width)).astype(np.uint16)


def odd_files(width: int = 80, height: int = 60) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Readable files by name, with the kinds of conversion they take."""
    colour = picture(1, width, height)
    turned = colour.transpose(Image.Transpose.ROTATE_90)
    frames = [picture(2, width, height), picture(3, width, height)]
    return {
        "grey.jpg": (encoded(colour.convert("L")), ("grey",)),
        "cmyk.jpg": (encoded(colour.convert("CMYK")), ("cmyk",)),
        "alpha.png": (encoded(colour.convert("RGBA"), "PNG"), ("alpha",)),
        "grey-alpha.png": (encoded(colour.convert("LA"), "PNG"), ("grey", "alpha")),
        "palette.png": (encoded(colour.convert("P"), "PNG"), ("palette",)),
        "bits.png": (encoded(colour.convert("1"), "PNG"), ("grey",)),
        "deep.png": (encoded(Image.fromarray(deep(0, width, height)), "PNG"), ("grey", "16-bit")),
        "turned.png": (rotated(turned, 6), ("rotated",)),
        "moving.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), ("palette", "animated")),
    }


def bad_files() -> dict[str, bytes]:
    whole = encoded(picture(4))
    return {"empty.jpg": b"", "cut.jpg": whole[: len(whole) // 2], "text.jpg": b"<html>404</html>"}


def open_small(name: str, source: Path, **counts: int) -> OpenSource:
    spec = replace(DATASETS[name], counts=counts)
    opened = spec.open(source, spec.counts)
    check_counts(spec, opened, source)
    return opened


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# CelebA

ATTRIBUTES = [f"Attribute_{i}" for i in range(40)]


def celeba_files(images: int = 12, seed: int = 0) -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    """Files by name, attributes [n, 40] of 0 and 1, and the split of each image."""
    attributes = np.random.default_rng(seed).integers(0, 2, (images, 40))
    splits = [0 if i < images // 2 else 1 + i % 2 for i in range(images)]
    names = [f"{i + 1:06d}.jpg" for i in range(images)]
    rows = [f"{name} " + " ".join(f"{2 * a - 1:2d}" for a in row) for name, row in zip(names, attributes, strict=True)]
    files = {f"img_align_celeba/{name}": encoded(picture(i, 178, 218)) for i, name in enumerate(names)}
    files["list_attr_celeba.txt"] = "\n".join([str(images), " ".join(ATTRIBUTES) + " ", *rows, ""]).encode()
    partition = [f"{name} {split}" for name, split in zip(names, splits, strict=True)]
    files["list_eval_partition.txt"] = "\r\n".join([*partition, ""]).encode()
    return files, attributes, splits


def write_celeba(path: Path, files: dict[str, bytes], packed: bool = True) -> Path:
    """The folder with the two lists, and the images as zip or folder."""
    if not packed:
        return write_folder(path, files)
    write_folder(path, {name: data for name, data in files.items() if "/" not in name})
    write_zip(path / "img_align_celeba.zip", {name: data for name, data in files.items() if "/" in name})
    return path


# ILSVRC2012

WNIDS = ["n01440764", "n01443537", "n02119789"]
IDS = {"n02119789": 1, "n01440764": 2, "n01443537": 3}  # ILSVRC2012's own numbers go in another order


def imagenet_images(each: int = 4) -> tuple[dict[str, bytes], list[tuple[str, str, bytes]]]:
    """Training images as WNID/NAME -> data, and validation images as (name, wnid, data)."""
    train = {
        f"{wnid}/{wnid}_{10 * i}.JPEG": encoded(picture(10 * c + i, 70 + 10 * i, 100 - 5 * c))
        for c, wnid in enumerate(WNIDS)
        for i in range(1, each + 1)
    }
    valid = [
        (f"ILSVRC2012_val_{i + 1:08d}.JPEG", WNIDS[(i * 2 + 1) % 3], encoded(picture(100 + i, 90, 120)))
        for i in range(6)
    ]
    return train, valid


def write_imagenet_tars(path: Path, train: dict[str, bytes], valid: list[tuple[str, str, bytes]]) -> Path:
    """Tar of tars, flat tar: classes and files in no order, as in the official archives."""
    path.mkdir()
    classes = {}
    for wnid in WNIDS[::-1]:
        own = {name.split("/")[1]: data for name, data in train.items() if name.startswith(wnid)}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in sorted(own, reverse=True):
                member = tarfile.TarInfo(name)
                member.size = len(own[name])
                tar.addfile(member, io.BytesIO(own[name]))
        classes[f"{wnid}.tar"] = buffer.getvalue()
    write_tar(path / "ILSVRC2012_img_train.tar", classes)
    write_tar(path / "ILSVRC2012_img_val.tar", {name: data for name, _, data in reversed(valid)})
    return path


def devkit_files(valid: list[tuple[str, str, bytes]]) -> dict[str, bytes]:
    """The development kit's list and meta.mat, with a synset that has children and is no class."""
    from scipy.io import savemat

    rows = [(n, wnid, f"words of {wnid}", "gloss", 0) for wnid, n in IDS.items()] + [(4, "n00000004", "top", "", 3)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array([[row] for row in rows], fields)}, do_compression=True)
    truth = "".join(f"{IDS[wnid]}\n" for _, wnid, _ in valid).encode()
    root = "ILSVRC2012_devkit_t12/"
    return {
        f"{root}data/ILSVRC2012_validation_ground_truth.txt": truth,
        f"{root}data/meta.mat": buffer.getvalue(),
        f"{root}readme.txt": b"hello",
    }


# SVHN


def svhn_arrays(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """X uint8 [32, 32, 3, n] and y uint8 [n, 1] in 1..10."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (32, 32, 3, images), dtype=np.uint8), rng.integers(1, 11, (images, 1), dtype=np.uint8)


# CIFAR-10 and the like: pickles


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A batch as Python 2 wrote the official ones: byte strings, numpy's old module name."""

    def text(s):
        return b"U" + bytes([len(s)]) + s

    def number(n):
        return b"K" + bytes([n]) if 0 <= n < 256 else b"J" + struct.pack("<i", n)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    data = images.tobytes()
    array += b"(K\x01(" + number(images.shape[0]) + number(images.shape[1]) + b"t" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(data)) + data + b"tb"
    listed = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."
