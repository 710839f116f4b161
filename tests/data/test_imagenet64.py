import io
import pickle

import numpy as np
import pytest
from archives import (
    WNIDS,
    bad_files,
    devkit_files,
    imagenet_images,
    odd_files,
    open_small,
    python2_pickle,
    write_folder,
    write_imagenet_tars,
    write_tar,
)
from PIL import Image

from ali_dist.data.images import shorter_side_crop
from ali_dist.recipe import UserError

COUNTS = {"train": 12, "valid": 6}
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def archives(path, kit="packed"):
    """The archives as fetched, with the development kit packed, unpacked, or only a text file."""
    train, valid = imagenet_images()
    write_imagenet_tars(path, train, valid)
    files = devkit_files(valid)
    if kit == "packed":
        write_tar(path / "ILSVRC2012_devkit_t12.tar.gz", files, "w:gz")
    elif kit == "unpacked":
        write_folder(path, files)
    elif kit == "beside":
        write_folder(path, {name.rpartition("/")[2]: data for name, data in files.items()})
    elif kit == "ids":
        (path / "imagenet_2012_validation_synset_labels.txt").write_text("".join(f"{w}\n" for _, w, _ in valid))
    elif kit == "names and ids":
        (path / TRUTH).write_text("".join(f"{name} {wnid}\n" for name, wnid, _ in valid))
    return path


def class_folders(path, flat=False):
    train, valid = imagenet_images()
    write_folder(path / "train", train)
    write_folder(path / "val", {name if flat else f"{wnid}/{name}": data for name, wnid, data in valid})
    if flat:
        write_folder(path, devkit_files(valid))
    return path


def contents(opened):
    return {
        split: [(samples[i].x.tobytes(), samples[i].y, samples[i].name.split("/")[-1]) for i in range(len(samples))]
        for split, samples in opened.splits.items()
    }


@pytest.mark.parametrize("kit", ["packed", "unpacked", "beside", "ids", "names and ids"])
def test_labels_and_pixels_of_the_archives(tmp_path, kit):
    opened = open_small("imagenet64", archives(tmp_path / "a", kit), **COUNTS)
    assert opened.classes == tuple(w if "ids" in kit else f"words of {w}" for w in WNIDS)
    train, valid = imagenet_images()
    expected = {
        "train": [(name.split("/")[1], WNIDS.index(name.split("/")[0]), train[name]) for name in sorted(train)],
        "valid": [(name, WNIDS.index(wnid), data) for name, wnid, data in valid],
    }
    for split, rows in expected.items():
        for at, (name, label, data) in enumerate(rows):
            sample = opened.splits[split][at]
            assert (sample.name, sample.y, sample.odd) == (name, label, ())
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(shorter_side_crop(image.convert("RGB"), 64))
            assert (sample.x == pixels.transpose(2, 0, 1)).all()


def test_folders_are_the_same_as_archives(tmp_path):
    packed = contents(open_small("imagenet64", archives(tmp_path / "a"), **COUNTS))
    assert contents(open_small("imagenet64", class_folders(tmp_path / "b"), **COUNTS)) == packed
    assert contents(open_small("imagenet64", class_folders(tmp_path / "c", flat=True), **COUNTS)) == packed


def test_samples_survive_the_way_to_another_process(tmp_path):
    for source in (archives(tmp_path / "a"), class_folders(tmp_path / "b")):
        opened = open_small("imagenet64", source, **COUNTS)
        before = contents(opened)
        assert contents(pickle.loads(pickle.dumps(opened))) == before


def test_odd_and_bad_images(tmp_path):
    train, valid = imagenet_images()
    odd = odd_files(100, 80)
    wnid = WNIDS[1]
    for i, name in enumerate(("grey.jpg", "cmyk.jpg", "turned.png")):  # ILSVRC2012 has a PNG under a JPEG's name
        train[f"{wnid}/{wnid}_{10 * (i + 1)}.JPEG"] = odd[name][0]
    train[f"{WNIDS[2]}/{WNIDS[2]}_10.JPEG"], train[f"{WNIDS[2]}/{WNIDS[2]}_20.JPEG"] = b"", bad_files()["cut.jpg"]
    write_tar(
        write_imagenet_tars(tmp_path / "a", train, valid) / "ILSVRC2012_devkit_t12.tar.gz", devkit_files(valid), "w:gz"
    )
    samples = open_small("imagenet64", tmp_path / "a", **COUNTS).splits["train"]
    assert [samples[i].odd for i in range(4, 8)] == [("grey",), ("cmyk",), ("rotated",), ()]
    for at, why in ((8, "_10.JPEG is empty"), (9, "_20.JPEG is no readable image")):
        with pytest.raises(UserError, match=f"ILSVRC2012_img_train.tar: {WNIDS[2]}{why}"):
            samples[at]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_damaged_archives(tmp_path):
    source = archives(tmp_path / "a")
    train = source / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    for size in (len(whole) // 2, len(whole) - 30_000, 1000, 0):
        train.write_bytes(whole[:size])
        with pytest.raises(UserError, match="img_train.tar is no tar archive or is cut short|has .* train images"):
            open_small("imagenet64", source, **COUNTS)
    write_tar(train, {"readme.txt": b""})
    with pytest.raises(UserError, match="holds readme.txt, which is no class's archive"):
        open_small("imagenet64", source, **COUNTS)
    train.write_bytes(whole)
    cut(source / "ILSVRC2012_devkit_t12.tar.gz", 100)
    with pytest.raises(UserError, match="devkit_t12.tar.gz is damaged: fetch it again"):
        open_small("imagenet64", source, **COUNTS)


def test_an_archive_cut_after_it_was_opened(tmp_path):
    source = archives(tmp_path / "a")
    samples = open_small("imagenet64", source, **COUNTS).splits["valid"]
    cut(source / "ILSVRC2012_img_val.tar", 2000)
    with pytest.raises(UserError, match="ILSVRC2012_val_00000001.JPEG is cut short"):
        samples[0]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_validation_ground_truth.txt or imagenet_2012_val"),
        ({TRUTH: b"1\n" * 6}, "has '1', which is no class, and meta.mat of ILSVRC2012_devkit_t12, which explains"),
        ({TRUTH: b"n01440764\n" * 5}, "has 5 lines for 6 validation images"),
        ({TRUTH: b"n99999999\n" * 6}, "validation images are of class n99999999, which is not in training"),
        ({TRUTH: b"1\n" * 6, "meta.mat": b"no table"}, "meta.mat is damaged: fetch"),
    ],
)
def test_wrong_lists(tmp_path, files, complaint):
    source = archives(tmp_path / "a", None)
    write_folder(source, files)
    with pytest.raises(UserError, match=complaint):
        open_small("imagenet64", source, **COUNTS)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="has neither ILSVRC2012_img_train.tar nor train/"):
        open_small("imagenet64", tmp_path)
    write_folder(tmp_path / "train", imagenet_images()[0])
    with pytest.raises(UserError, match="has neither ILSVRC2012_img_val.tar nor val/"):
        open_small("imagenet64", tmp_path)
    (tmp_path / "some.tar").write_bytes(b"")
    with pytest.raises(UserError, match="some.tar must be the folder that holds ILSVRC2012_img_train.tar"):
        open_small("imagenet64", tmp_path / "some.tar")


# the published batches

BATCHES = [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]


def batch_arrays(i):
    rng = np.random.default_rng(i)
    return rng.integers(0, 256, (2 + i % 3, 12288), dtype=np.uint8), rng.integers(1, 1001, 2 + i % 3)


def write_batches(path, kind, below=""):
    for i, name in enumerate(BATCHES):
        data, labels = batch_arrays(i)
        at = path / (below.format("train" if i < 10 else "val"))
        at.mkdir(parents=True, exist_ok=True)
        if kind.startswith("npz"):
            (np.savez_compressed if kind == "npz" else np.savez)(at / name, data=data, labels=labels, mean=data.mean(0))
        elif kind == "python2":
            (at / name).write_bytes(python2_pickle(data, labels))
        else:
            tree = {"data": data, "labels": labels.tolist(), "mean": data.mean(0)}
            (at / name).write_bytes(pickle.dumps(tree, int(kind)))
    return path


SIZES = {"train": sum(2 + i % 3 for i in range(10)), "valid": 2 + 10 % 3}


@pytest.mark.parametrize("kind", ["npz", "npz, not compressed", "python2", "2", "3", "4"])
def test_published_batches(tmp_path, kind):
    below = "Imagenet64_{}" if kind == "npz" else ""
    opened = open_small("imagenet64", write_batches(tmp_path, kind, below), **SIZES)
    assert len(opened.classes) == 1000 and opened.classes[7] == "ILSVRC2012 class 8" and opened.serial
    images, labels = (np.concatenate(part) for part in zip(*(batch_arrays(i) for i in range(10)), strict=True))
    for i in reversed(range(SIZES["train"])):
        x, y = opened.splits["train"][i]
        assert (x == images[i].reshape(3, 64, 64)).all() and y == labels[i] - 1
    assert (opened.splits["valid"][0][0] == batch_arrays(10)[0][0].reshape(3, 64, 64)).all()


def test_names_of_the_published_classes(tmp_path):
    write_batches(tmp_path, "npz")
    wnids = [f"n{i:08d}" for i in np.random.default_rng(0).permutation(1000)]
    (tmp_path / "map_clsloc.txt").write_text("".join(f"{w} {i + 1} name_{w}\n" for i, w in enumerate(wnids)))
    opened = open_small("imagenet64", tmp_path, **SIZES)
    assert opened.classes == tuple(f"name_n{i:08d}" for i in range(1000))
    label = batch_arrays(10)[1][0]
    assert opened.splits["valid"][0][1] == int(wnids[label - 1][1:])
    (tmp_path / "map_clsloc.txt").write_text("n00000001 1 one\n")
    with pytest.raises(UserError, match="map_clsloc.txt is not a list"):
        open_small("imagenet64", tmp_path, **SIZES)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train_data_batch_3", lambda trap: pickle.dumps({"data": trap, "labels": [1]})),
        ("train_data_batch_3", lambda trap: python2_pickle(*batch_arrays(2))[:-900]),
        ("train_data_batch_3", lambda trap: pickle.dumps({"data": batch_arrays(2)[0], "labels": [1, 2, 0, 4]})),
        ("train_data_batch_3", lambda trap: pickle.dumps({"data": batch_arrays(2)[0][:, 1:], "labels": [1] * 4})),
        ("train_data_batch_3", lambda trap: b""),
        ("val_data.npz", lambda trap: npz(data=np.array([trap]), labels=[1])),
        ("val_data.npz", lambda trap: npz(data=batch_arrays(1)[0] / 2, labels=[1] * 3)),
        ("val_data.npz", lambda trap: npz(data=batch_arrays(1)[0], labels=[1] * 2)),
        ("val_data.npz", lambda trap: flipped(npz(data=batch_arrays(1)[0], labels=[1] * 3))),
    ],
)
def test_damaged_and_hostile_batches(tmp_path, name, data):
    write_batches(tmp_path, "npz" if name.endswith("npz") else "3")
    trap = Trap(tmp_path / "sprung")
    (tmp_path / name).write_bytes(data(trap))
    with pytest.raises(UserError, match=f"{name} is damaged or not a batch of 64x64 ImageNet: fetch it again"):
        open_small("imagenet64", tmp_path, **SIZES)
    assert not trap.path.exists()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def flipped(data):
    return data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]


def test_a_missing_batch(tmp_path):
    write_batches(tmp_path, "3")
    (tmp_path / "train_data_batch_7").unlink()
    with pytest.raises(UserError, match="has no file train_data_batch_7 or train_data_batch_7.npz"):
        open_small("imagenet64", tmp_path, **SIZES)
