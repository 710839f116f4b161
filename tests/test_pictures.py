import numpy as np
import pytest
import torch
from PIL import Image

from ali_dist.pictures import GAP, LINE, MARGIN, enlarged, labelled, save_png, tile, to_uint8


@pytest.mark.parametrize("n, columns, rows", [(6, 3, 2), (5, 3, 2), (1, 3, 1), (7, 2, 4)])
def test_tile_pixel_by_pixel(n, columns, rows):
    images = torch.randint(1, 256, (n, 3, 4, 5), dtype=torch.uint8)
    sheet = tile(images, columns)
    assert sheet.shape == (3, rows * 4, columns * 5) and sheet.dtype == torch.uint8
    for i in range(rows * columns):
        top, left = i // columns * 4, i % columns * 5
        cell = sheet[:, top : top + 4, left : left + 5]
        assert torch.equal(cell, images[i]) if i < n else not cell.any()


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-0.1, 0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1, 1.2])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 127, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 255), every)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_pixel_for_pixel(tmp_path, channels):
    pixels = torch.randint(0, 256, (channels, 7, 5), dtype=torch.uint8)
    save_png(tmp_path / "a.png", pixels)
    read = np.asarray(Image.open(tmp_path / "a.png"))
    expected = pixels.permute(1, 2, 0).numpy()
    assert np.array_equal(read, expected[..., 0] if channels == 1 else expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("words", [{}, {"rows": ("one", "second row"), "columns": "abc", "legend": ("a: long " * 9,)}])
def test_labelled_cells_keep_every_pixel(channels, words):
    cells = torch.randint(0, 256, (2, 3, channels, 17, 21), dtype=torch.uint8)
    sheet, (top, left) = labelled(cells, "title", **words)
    assert sheet.dtype == torch.uint8 and sheet.shape[0] == 3
    covered = torch.zeros(sheet.shape[1:], dtype=torch.bool)
    for i in range(2):
        for j in range(3):
            y, x = top + i * (17 + GAP), left + j * (21 + GAP)
            assert torch.equal(sheet[:, y : y + 17, x : x + 21], cells[i, j].expand(3, -1, -1))
            covered[y : y + 17, x : x + 21] = True
    # The rest is black text on white, in the title, before the rows, above the columns and below
    rest = sheet.amin(0).masked_fill(covered, 255)
    assert set(rest.unique().tolist()) == {0, 255} == set(sheet[:, ~covered].unique().tolist())
    bottom = top + 2 * (17 + GAP)
    title = MARGIN + LINE
    assert (rest[:title] == 0).any()
    for part, there in (
        (rest[top:bottom, :left], bool(words)),
        (rest[title:top, left:], bool(words)),
        (rest[bottom:], bool(words)),
        (rest[top:bottom, left:], False),
    ):
        assert (part == 0).any() == there


def test_text_is_never_cut_off():
    blank = torch.zeros(1, 1, 1, 8, 8, dtype=torch.uint8)
    for text in ("x", "a title much wider than its cells, with qgjpy"):
        sheet, _ = labelled(blank, text, (text,), (), (text,))
        assert (sheet[:, :, -1] == 255).all() and (sheet[:, -1] == 255).all() and (sheet[:, 0] == 255).all()


def test_enlarged_pixels_are_squares():
    cells = torch.arange(24, dtype=torch.uint8).view(1, 2, 1, 3, 4)
    big = enlarged(cells, 3)
    assert big.shape == (1, 2, 1, 9, 12)
    for dy in range(3):
        for dx in range(3):
            assert torch.equal(big[..., dy::3, dx::3], cells)
    assert torch.equal(enlarged(cells, 1), cells)
