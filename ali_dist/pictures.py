"""Images side by side, pixel for pixel: plain sheets, sheets with labels, PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, MARGIN, LINE = 2, 6, 13  # pixels: between cells, around all, a line of text
PAPER, INK = (255, 255, 255), (0, 0, 0)


def tile(images: Tensor, columns: int) -> Tensor:
    """uint8 [N, C, H, W] -> one uint8 image [C, rows * H, columns * W], row by row, blank where images run out."""
    cells = grid(images, columns)
    rows, _, c, h, w = cells.shape
    return cells.permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def grid(images: Tensor, columns: int) -> Tensor:
    """[N, C, H, W] -> [rows, columns, C, H, W], row by row, blank where images run out."""
    n, *shape = images.shape
    rows = -(-n // columns)
    cells = images.new_zeros(rows * columns, *shape)
    cells[:n] = images
    return cells.unflatten(0, (rows, columns))


def labelled(
    cells: Tensor,
    title: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    legend: Sequence[str] = (),
) -> tuple[Tensor, tuple[int, int]]:
    """A sheet uint8 [3, H, W] of cells uint8 [R, C, c, h, w], c 1 or 3, and the top left corner of the first cell.

    Cells lie `GAP` apart and keep their pixels. A label stands before each row and above each column, where given;
    the title is above all, the legend's lines are below.
    """
    count_rows, count_columns, _, h, w = cells.shape
    font = ImageFont.load_default_imagefont()  # a bitmap, the same everywhere
    widths = {text: int(font.getlength(text)) for text in (title, *rows, *columns, *legend)}
    top = MARGIN + LINE * (2 if columns else 1)
    left = MARGIN + (max(widths[row] for row in rows) + MARGIN if rows else 0)
    cells_end = left + count_columns * (w + GAP) - GAP
    width = MARGIN + max(cells_end, *(MARGIN + widths[text] for text in (title, *legend)))
    bottom = top + count_rows * (h + GAP) - GAP
    height = bottom + MARGIN + LINE * len(legend)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN // 2), title, INK, font)
    for i, row in enumerate(rows):
        draw.text((MARGIN, top + i * (h + GAP) + (h - LINE) // 2), row, INK, font)
    for j, column in enumerate(columns):
        draw.text((left + j * (w + GAP) + (w - widths[column]) // 2, top - LINE), column, INK, font)
    for k, line in enumerate(legend):
        draw.text((MARGIN, bottom + MARGIN // 2 + k * LINE), line, INK, font)
    sheet = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for i in range(count_rows):
        for j in range(count_columns):
            y, x = top + i * (h + GAP), left + j * (w + GAP)
            sheet[:, y : y + h, x : x + w] = cells[i, j]
    return sheet, (top, left)


def enlarged(cells: Tensor, scale: int) -> Tensor:
    """Every pixel of [..., H, W] as a square of scale x scale."""
    return cells.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def to_uint8(x: Tensor) -> Tensor:
    """[0, 1] float -> uint8, on the CPU."""
    return (x.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(path: Path, pixels: Tensor) -> None:
    """Writes uint8 [C, H, W] (C 1 or 3) pixel for pixel, whole or not at all."""
    array = pixels.permute(1, 2, 0).numpy()
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(partial, "PNG")
    partial.replace(path)
