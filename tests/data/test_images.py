"""What becomes of each kind of image file."""

import io

import numpy as np
import pytest
from archives import bad_files, deep, encoded, odd_files, picture, rotated
from PIL import Image

from ali_dist.data.files import Names
from ali_dist.data.images import Unreadable, decode, shorter_side_crop, to_array


@pytest.mark.parametrize("name", odd_files())
def test_unusual_files_are_converted_and_named(name):
    data, kinds = odd_files()[name]
    image, odd = decode(data)
    assert (image.mode, image.size, odd) == ("RGB", (80, 60), kinds)


def test_a_usual_file_is_as_pillow_gives_it():
    data = encoded(picture(0))
    image, odd = decode(data)
    x = to_array(image)
    assert odd == () and x.dtype == np.uint8 and x.shape == (3, 60, 80)
    with Image.open(io.BytesIO(data)) as plain:
        assert (x == np.asarray(plain.convert("RGB")).transpose(2, 0, 1)).all()


def test_pixels_of_the_conversions():
    def array(name):
        return np.asarray(decode(odd_files()[name][0])[0])

    colour = np.asarray(picture(1))
    assert (array("alpha.png") == colour).all()
    assert (array("turned.png") == colour).all()
    assert (array("deep.png") == (deep() >> 8)[:, :, None]).all()
    assert (array("grey-alpha.png") == np.asarray(picture(1).convert("L"))[:, :, None]).all()
    assert np.abs(array("cmyk.jpg").astype(int) - colour).mean() < 8
    assert np.abs(array("moving.gif").astype(int) - np.asarray(picture(2))).mean() < 12  # the first frame


def test_transparency_does_not_change_colours():
    hidden = Image.fromarray(np.full((4, 4, 4), (10, 20, 30, 0), np.uint8))
    assert (np.asarray(decode(encoded(hidden, "PNG"))[0]) == (10, 20, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    colour = picture(1)
    stored = {
        1: colour,
        2: colour.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: colour.transpose(Image.Transpose.ROTATE_180),
        4: colour.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: colour.transpose(Image.Transpose.TRANSPOSE),
        6: colour.transpose(Image.Transpose.ROTATE_90),
        7: colour.transpose(Image.Transpose.TRANSVERSE),
        8: colour.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    image, odd = decode(rotated(stored, orientation))
    assert (np.asarray(image) == np.asarray(colour)).all() and odd == (("rotated",) if orientation > 1 else ())


def test_a_damaged_exif_block_turns_nothing():
    whole = rotated(picture(1), 6)
    at = whole.index(b"eXIf") + 4
    image, odd = decode(encoded(picture(1), exif=b"Exif\0\0" + whole[at : at + 9] + b"\xff" * 20))
    assert image.size == (80, 60) and odd == ()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bad_files()["empty.jpg"], "is empty"),
        (bad_files()["cut.jpg"], "is no readable image .*truncated"),
        (bad_files()["text.jpg"], "is no image of a known format"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "more than 16 bits"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "is no image of a known format",
        ),
    ],
)
def test_unreadable_files(data, why):
    with pytest.raises(Unreadable, match=why):
        decode(data)


def test_a_decompression_bomb(monkeypatch):
    data = encoded(Image.new("L", (300, 300)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable, match="decompression bomb"):
        decode(data)


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64), (500, 375), (65, 64), (30, 20), (333, 111)])
def test_the_crop_to_the_pixel(size):
    image = picture(5, *size)
    width, height = size
    if width <= height:
        new = (64, int(64 * height / width))
        box = (0, (new[1] - 64) // 2, 64, (new[1] - 64) // 2 + 64)
    else:
        new = (int(64 * width / height), 64)
        box = ((new[0] - 64) // 2, 0, (new[0] - 64) // 2 + 64, 64)
    expected = np.asarray(image.resize(new, Image.LANCZOS))[box[1] : box[3], box[0] : box[2]]
    assert expected.shape == (64, 64, 3) and (np.asarray(shorter_side_crop(image, 64)) == expected).all()


def test_a_sliver_is_unreadable():
    with pytest.raises(Unreadable, match="is 300x2, too narrow"):
        shorter_side_crop(Image.new("RGB", (300, 2)), 64)


def test_names_come_back():
    names = ["a/b.jpg", "", "ü\udcff.png", "z" * 300]
    stored = Names(names)
    assert len(stored) == 4 and [stored[i] for i in range(4)] == names
