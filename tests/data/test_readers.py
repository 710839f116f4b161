"""The readers on small archives in the official layouts."""

import io
import os
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from archives import python2_pickle
from PIL import Image
from sklearn.datasets import load_digits

from ali_dist.data.pack import check_counts
from ali_dist.data.table import DATASETS
from ali_dist.recipe import UserError

RNG = np.random.default_rng(0)


def open_small(name, source, **counts):
    spec = replace(DATASETS[name], counts=counts)
    opened = spec.open(source, spec.counts)
    check_counts(spec, opened, source)
    return opened


# digits


def test_digits():
    spec = DATASETS["digits"]
    opened = spec.open(None, spec.counts)
    check_counts(spec, opened, None)
    assert opened.classes == tuple("0123456789")
    raw = load_digits()
    x, y = opened.splits["valid"][2]
    small = Image.fromarray(np.round(raw.images[10] * 255 / 16).astype(np.uint8))
    assert x.dtype == np.uint8 and (x[0] == np.asarray(small.resize((32, 32), Image.BICUBIC))).all()
    assert y == raw.target[10]
    assert [opened.splits["train"][i][1] for i in range(5)] == raw.target[[1, 2, 3, 4, 6]].tolist()


# CIFAR-10

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGES = RNG.integers(0, 256, (60, 3072), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 60)
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
COUNTS = {"train": 45, "valid": 5, "test": 10}


def python3_pickle(rows, protocol=2):
    return pickle.dumps({b"data": IMAGES[rows], b"labels": LABELS[rows].tolist(), b"filenames": []}, protocol)


def binary(rows):
    return np.concatenate([LABELS[rows, None].astype(np.uint8), IMAGES[rows]], axis=1).tobytes()


def cifar_files(kind):
    rows = np.split(np.arange(60), 6)
    if kind == "binary":
        files = {f"{name}.bin": binary(r) for name, r in zip(BATCHES, rows, strict=True)}
        return {**files, "batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode(), "readme.html": b""}
    write = (lambda rows: python2_pickle(IMAGES[rows], LABELS[rows])) if kind == "python2" else python3_pickle
    files = {name: write(r) for name, r in zip(BATCHES, rows, strict=True)}
    return {**files, "batches.meta": pickle.dumps({"label_names": NAMES, "num_cases_per_batch": 10}, 2)}


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["python2", "python3", "binary"])
def test_cifar10(tmp_path, kind, packed):
    source = write_tar(tmp_path / "cifar.tar.gz", cifar_files(kind))
    if not packed:
        with tarfile.open(source) as tar:
            tar.extractall(tmp_path, filter="data")
        source = tmp_path / "cifar-10-batches-py"
    opened = open_small("cifar10", source, **COUNTS)
    assert opened.classes == tuple(NAMES)
    at = 0
    for split, count in COUNTS.items():
        for i in range(count):
            x, y = opened.splits[split][i]
            assert x.dtype == np.uint8 and (x == IMAGES[at].reshape(3, 32, 32)).all() and y == LABELS[at]
            at += 1


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["call", "array of objects", "numpy function", "eval"])
def test_a_hostile_pickle_runs_nothing(tmp_path, kind):
    trap = Trap(tmp_path / "sprung")
    hostile = {
        "call": pickle.dumps({"data": trap, "labels": [0]}, 2),
        "array of objects": pickle.dumps({"data": np.array([trap]), "labels": [0]}, 2),
        "numpy function": b"cnumpy\nsave\n(U\x01xK\x00tR.",
        "eval": b"c__builtin__\neval\n(U\x031+1tR.",
    }[kind]
    source = write_tar(tmp_path / "cifar.tar.gz", {**cifar_files("python3"), "data_batch_3": hostile})
    with pytest.raises(UserError, match="cifar.tar.gz: data_batch_3 .*fetch it again .*(asks for|object|O8)"):
        open_small("cifar10", source, **COUNTS)
    assert not trap.folder.exists()
    if kind == "call":
        pickle.loads(hostile)
        assert trap.folder.exists(), "the trap itself must work"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"data_batch_4": None}, "has no file data_batch_4: .*fetch it again"),
        ({"batches.meta": None}, "has no file batches.meta: .*fetch it again"),
        ({"data_batch_2": b""}, "data_batch_2 is damaged"),
        ({"data_batch_2": python3_pickle(np.arange(10))[:-900]}, "data_batch_2 is damaged"),
        ({"data_batch_2": python3_pickle(np.arange(9))}, "has 44 train images instead of 45"),
        ({"data_batch_2": pickle.dumps({"data": IMAGES[:3], "labels": [1, 2]}, 2)}, "data_batch_2 is damaged"),
        ({"test_batch": pickle.dumps({"data": IMAGES[:10], "labels": [11] * 10}, 2)}, "labels outside 0..9"),
        ({"test_batch": pickle.dumps({"data": IMAGES[:10] / 2, "labels": [1] * 10}, 2)}, "instead of uint8"),
    ],
)
def test_a_wrong_cifar10_archive(tmp_path, files, complaint):
    files = {name: data for name, data in {**cifar_files("python3"), **files}.items() if data is not None}
    source = write_tar(tmp_path / "cifar.tar.gz", files)
    with pytest.raises(UserError, match=f"cifar.tar.gz.*{complaint}"):
        open_small("cifar10", source, **COUNTS)


def test_a_binary_batch_cut_short(tmp_path):
    source = write_tar(tmp_path / "cifar.tar.gz", {**cifar_files("binary"), "data_batch_5.bin": binary([1])[:-1]})
    with pytest.raises(UserError, match="data_batch_5.bin is damaged"):
        open_small("cifar10", source, **COUNTS)


@pytest.mark.parametrize("name", ["cifar10", "tinyimagenet"])
@pytest.mark.parametrize("content", ["half", "garbage", "empty"])
def test_a_damaged_archive(tmp_path, name, content):
    source = tmp_path / "archive"
    if name == "cifar10":
        write_tar(source, cifar_files("python3"))
    else:
        write_zip(source, tiny_files())
    data = {"half": source.read_bytes()[: source.stat().st_size // 2], "garbage": b"<html>404</html>", "empty": b""}
    source.write_bytes(data[content])
    with pytest.raises(UserError, match="archive .*fetch it again"):
        open_small(name, source, train=6, valid=3)


# tiny-imagenet-200

WNIDS = ["n02", "n01", "n03"]
TINY = {"train": 6, "valid": 3, "unlabelled": 1}


def jpeg(colour, mode="RGB", size=64):
    buffer = io.BytesIO()
    Image.new(mode, (size, size), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tiny_files():
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n01\tgoldfish, carp\nn02\ttoad\nn99\tother\n"}
    for label, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        for i in range(2):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg((10, 100 * label, 100 * i))
    files["val/images/val_0.JPEG"] = jpeg(77, "L")
    files["val/images/val_1.JPEG"] = jpeg((0, 0, 200))
    files["val/images/val_2.JPEG"] = jpeg((0, 200, 0))
    files["val/val_annotations.txt"] = b"".join(
        b"val_%d.JPEG\t%s\t0\t0\t62\t62\n" % (i, wnid) for i, wnid in enumerate([b"n03", b"n01", b"n02"])
    )
    files["test/images/test_0.JPEG"] = jpeg((1, 2, 3))
    return files


def write_zip(path, files, stored=False):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", data)
    return path


@pytest.mark.parametrize("kind", ["zip", "folder", "parent"])
def test_tinyimagenet(tmp_path, kind):
    source = write_zip(tmp_path / "tiny.zip", tiny_files())
    if kind != "zip":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(tmp_path / "out")
        source = tmp_path / "out" / ("tiny-imagenet-200" if kind == "folder" else "")
    opened = open_small("tinyimagenet", source, **TINY)
    assert opened.classes == ("toad", "goldfish, carp", "n03")
    train = [opened.splits["train"][i] for i in range(6)]
    assert [label for _, label, *_ in train] == [1, 1, 0, 0, 2, 2]  # files by name, labels by wnids.txt
    for at, (x, label, odd, _) in enumerate(train):
        assert x.shape == (3, 64, 64) and x.dtype == np.uint8 and odd == ()
        assert np.abs(x.mean((1, 2)) - [10, 100 * label, 100 * (at % 2)]).max() < 3
    grey, label, odd, name = opened.splits["valid"][0]
    assert label == 2 and (grey == 77).all() and odd == ("grey",) and name.endswith("val/images/val_0.JPEG")
    assert [opened.splits["valid"][i][1] for i in range(3)] == [2, 1, 0]
    x, label, *_, name = opened.splits["unlabelled"][0]
    assert label == -1 and np.abs(x.mean((1, 2)) - [1, 2, 3]).max() < 2 and name.endswith("test/images/test_0.JPEG")


def test_tinyimagenet_without_words(tmp_path):
    files = tiny_files()
    del files["words.txt"]
    assert open_small("tinyimagenet", write_zip(tmp_path / "tiny.zip", files), **TINY).classes == tuple(WNIDS)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"wnids.txt": None}, "has no file wnids.txt"),
        ({"val/val_annotations.txt": None}, "has no file val/val_annotations.txt"),
        ({"val/val_annotations.txt": b"val_0.JPEG\n"}, "val_annotations.txt is damaged at 'val_0.JPEG'"),
        ({"val/images/val_1.JPEG": None}, "val/images/val_1.JPEG is not there"),
        ({"train/n03/images/n03_1.JPEG": None}, "has 5 train images instead of 6"),
        ({"train/n03/images/n03_1.JPEG": b"no image"}, "train/n03/images/n03_1.JPEG is no image of a known"),
        ({"train/n03/images/n03_1.JPEG": jpeg(0, "L")[:-150]}, "train/n03/images/n03_1.JPEG is no readable image"),
        ({"train/n03/images/n03_1.JPEG": jpeg(0, "L", 63)}, "n03_1.JPEG is 63x63, not 64x64"),
    ],
)
def test_a_wrong_tinyimagenet_archive(tmp_path, files, complaint):
    files = {name: data for name, data in {**tiny_files(), **files}.items() if data is not None}
    source = write_zip(tmp_path / "tiny.zip", files)
    with pytest.raises(UserError, match=f"tiny.zip.*{complaint}"):
        opened = open_small("tinyimagenet", source, **TINY)
        [split[i] for split in opened.splits.values() for i in range(len(split))]


def test_a_changed_byte_inside_the_zip_is_named(tmp_path):
    source = write_zip(tmp_path / "tiny.zip", tiny_files(), stored=True)
    data = source.read_bytes()
    image = tiny_files()["train/n03/images/n03_0.JPEG"]
    at = data.index(image) + len(image) // 2
    source.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    opened = open_small("tinyimagenet", source, **TINY)
    with pytest.raises(
        UserError, match="tiny.zip: tiny-imagenet-200/train/n03/images/n03_0.JPEG is damaged .*fetch it again"
    ):
        opened.splits["train"][4]
