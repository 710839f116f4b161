import numpy as np
import pytest
from archives import encoded, odd_files, open_small, picture, write_folder, write_zip

from ali_dist.data.images import shorter_side_crop
from ali_dist.data.table import DATASETS
from ali_dist.recipe import UserError


def files(*names):
    return {name: encoded(picture(i), "PNG") for i, name in enumerate(names)}


def layout(opened):
    return {
        split: [(samples[i].name, opened.classes[samples[i].y]) for i in range(len(samples))]
        for split, samples in opened.splits.items()
    }


ANIMALS = files(*(f"{kind}/{i:02d}.png" for kind in ("dog", "cat") for i in range(6)))


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("root", ["", "animals/"])
def test_classes_and_every_tenth_held_out(tmp_path, write, root):
    others = {"readme.txt": b"", "dog/.hidden.png": b"x", "__MACOSX/dog/._00.png": b"x", "cat/notes.md": b""}
    source = write(tmp_path / "animals", {root + name: data for name, data in {**ANIMALS, **others}.items()})
    opened = open_small("folder", source)
    names = [root + name for name in sorted(ANIMALS)]
    classes = [name.removeprefix(root).split("/")[0] for name in names]
    rows = list(zip(names, classes, strict=True))
    assert opened.classes == ("cat", "dog")
    found = layout(opened)
    assert sorted(found["valid"]) == [rows[0], rows[10]] and found["train"] == rows[1:10] + rows[11:]
    x = opened.splits["valid"][found["valid"].index(rows[0])].x
    expected = np.asarray(shorter_side_crop(picture(6), 64)).transpose(2, 0, 1)
    assert x.shape == (3, 64, 64) and (x == expected).all()


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_a_source_that_comes_split(tmp_path, valid):
    names = ["train/b/1.png", "train/a/deep/2.jpeg", f"{valid}/a/3.png", "test/b/4.PNG"]
    opened = open_small("folder", write_folder(tmp_path, files(*names)))
    assert opened.classes == ("a", "b")
    assert layout(opened) == {
        "train": [("train/a/deep/2.jpeg", "a"), ("train/b/1.png", "b")],
        "valid": [(f"{valid}/a/3.png", "a")],
        "test": [("test/b/4.PNG", "b")],
    }


def test_train_without_valid_is_held_out_too(tmp_path):
    opened = open_small("folder", write_zip(tmp_path / "a.zip", files(*(f"x/train/c/{i}.png" for i in range(10)))))
    assert layout(opened)["valid"] == [("x/train/c/0.png", "c")] and len(opened.splits["train"]) == 9


def test_first_images_to_validate_and_test_on_are_of_all_classes(tmp_path):
    names = [
        f"{split}/{kind}/{i:02d}.png" for split in ("train", "valid", "test") for kind in "abcd" for i in range(20)
    ]
    found = layout(open_small("folder", write_folder(tmp_path, files(*names))))
    assert layout(open_small("folder", tmp_path)) == found  # the same each time
    for split in ("valid", "test"):
        assert sorted(name for name, _ in found[split]) == [name for name in names if name.startswith(split)]
        assert {kind for _, kind in found[split][:20]} == set("abcd")


def test_images_without_classes(tmp_path):
    opened = open_small("folder", write_folder(tmp_path, files("1.png", "2.png", "3.webp")))
    assert opened.classes == ("image",) and len(opened.splits["train"]) == 2


def test_another_size(tmp_path):
    source = write_folder(tmp_path, ANIMALS)
    opened = DATASETS["folder"].open(source, {}, size=32)
    assert (opened.splits["valid"][0].x == np.asarray(shorter_side_crop(picture(6), 32)).transpose(2, 0, 1)).all()


def test_odd_images(tmp_path):
    odd = odd_files()
    source = write_folder(tmp_path, {f"train/a/{name}": data for name, (data, _) in odd.items()})
    write_folder(tmp_path, files("valid/a/1.png"))
    train = open_small("folder", source).splits["train"]
    assert {train[i].name: train[i].odd for i in range(len(train))} == {f"train/a/{n}": k for n, (_, k) in odd.items()}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "holds no images: none of its 0 files ends in .jpg"),
        (["notes.txt"], "holds no images: none of its 1 files"),
        (["a/1.png"], "holds too few images"),
        (["a/1.png", "2.png", "a/3.png"], "2.png is in no class folder, but others are"),
        (["train/a/1.png", "extra/2.png"], "extra/2.png lies beside train/, in none of train/, valid/, val/, test/"),
        (["train/a/1.png", "valid/b/2.png"], "valid/b/2.png is of class 'b', of which there is no image to train on"),
    ],
)
def test_layouts_that_mean_nothing(tmp_path, names, complaint):
    with pytest.raises(UserError, match=complaint):
        open_small("folder", write_folder(tmp_path, {name: b"x" for name in names}))
