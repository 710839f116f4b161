import io

import numpy as np
import pytest
from archives import ATTRIBUTES, bad_files, celeba_files, encoded, open_small, picture, write_celeba, write_zip
from PIL import Image

from ali_dist.recipe import UserError

COUNTS = {"train": 6, "valid": 3, "test": 3}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "celeba"])
def test_splits_attributes_and_pixels(tmp_path, packed, below):
    files, attributes, splits = celeba_files()
    files["identity_CelebA.txt"] = b"000001.jpg 2880\n"  # may be there
    write_celeba(tmp_path / below, files, packed)
    opened = open_small("celeba", tmp_path, **COUNTS)
    assert opened.classes == () and opened.attributes == tuple(ATTRIBUTES)
    for number, split in enumerate(("train", "valid", "test")):
        rows = [i for i in range(12) if splits[i] == number]
        assert len(opened.splits[split]) == len(rows)
        for at, i in enumerate(rows):
            x, y, odd, name = opened.splits[split][at]
            assert y.dtype == np.uint8 and (y == attributes[i]).all()
            assert odd == () and name.endswith(f"{i + 1:06d}.jpg")
            with Image.open(io.BytesIO(files[f"img_align_celeba/{i + 1:06d}.jpg"])) as image:
                resized = np.asarray(image.resize((64, 78), Image.LANCZOS))
            assert x.shape == (3, 64, 64) and (x == resized[7:71].transpose(2, 0, 1)).all()


def test_odd_and_bad_images(tmp_path):
    files, *_ = celeba_files()
    files["img_align_celeba/000002.jpg"] = encoded(picture(2, 178, 218, "L"))
    files["img_align_celeba/000003.jpg"] = bad_files()["cut.jpg"]
    files["img_align_celeba/000004.jpg"] = b""
    files["img_align_celeba/000005.jpg"] = encoded(picture(2, 178, 217))
    del files["img_align_celeba/000006.jpg"]
    train = open_small("celeba", write_celeba(tmp_path, files), **COUNTS).splits["train"]
    assert train[1].odd == ("grey",)
    for at, why in ((2, "is no readable image"), (3, "is empty"), (4, "is 178x217, not 178x218"), (5, "is not there")):
        with pytest.raises(UserError, match=rf"img_align_celeba.zip: .*{at + 1:06d}.jpg {why}.*fetch"):
            train[at]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"list_attr_celeba.txt": None}, "list_attr_celeba.txt is not there"),
        ({"list_eval_partition.txt": None}, "list_eval_partition.txt is not there"),
        ({"list_attr_celeba.txt": b"1\nMale\n000001.jpg 1\n"}, "names 1 attributes in its second line instead of 40"),
        ({"list_attr_celeba.txt": b""}, "names 0 attributes"),
        ({"list_eval_partition.txt": b"000001.jpg 0\n000002.jpg 3\n"}, "line 2: '000002.jpg 3' is no image of"),
        ({"list_eval_partition.txt": b"000099.jpg 0\n"}, "line 1: '000099.jpg 0' is no image of list_attr"),
        ({"list_eval_partition.txt": b"000001.jpg 0\n"}, "has 1 train images instead of 6"),
        ({"list_eval_partition.txt": b"\xff\xfe"}, "cannot read .*list_eval_partition.txt"),
    ],
)
def test_wrong_lists(tmp_path, files, complaint):
    files = {name: data for name, data in {**celeba_files()[0], **files}.items() if data is not None}
    with pytest.raises(UserError, match=complaint):
        open_small("celeba", write_celeba(tmp_path, files), **COUNTS)


@pytest.mark.parametrize("edit", [(b" 1", b" 2"), (b"-1", b""), (b"12\n", b"13\n")])
def test_a_damaged_list_of_attributes(tmp_path, edit):
    files, *_ = celeba_files()
    files["list_attr_celeba.txt"] = files["list_attr_celeba.txt"].replace(*edit, 1)
    with pytest.raises(
        UserError, match="list_attr_celeba.txt.*(is not a name and 40 times|lists 13 images and lists 12)"
    ):
        open_small("celeba", write_celeba(tmp_path, files), **COUNTS)


def test_no_images(tmp_path):
    write_celeba(tmp_path, celeba_files()[0])
    (tmp_path / "img_align_celeba.zip").unlink()
    with pytest.raises(
        UserError, match="must be a folder with img_align_celeba.zip, .*img_align_celeba.zip is not there"
    ):
        open_small("celeba", tmp_path)
    (tmp_path / "img_align_celeba.zip").write_bytes(b"<html>too many downloads</html>")
    with pytest.raises(UserError, match="img_align_celeba.zip is no zip archive"):
        open_small("celeba", tmp_path)
    write_zip(tmp_path / "all.zip", {"a": b""})
    with pytest.raises(UserError, match="all.zip must be a folder"):
        open_small("celeba", tmp_path / "all.zip")
