"""What the arithmetic of a step costs when each of its products runs alone in its best form."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ali_dist.tables import Networks, Row, plane_shapes

REPEATS, SECONDS = 5, 0.2


@dataclass(frozen=True, slots=True)
class Product:
    """A convolution of a step: its row, input [C, H, W], images, and how often each of its three products is made."""

    layer: str
    row: Row
    shape: tuple[int, int, int]
    images: int
    forward: int
    input_grad: int
    weight_grad: int

    @property
    def flops(self) -> int:
        """Of one of the three products, 2 a multiply-add."""
        _, height, width = self.shape if self.row.transposed else plane_shapes(self.shape, [self.row])[0]
        return 2 * self.row.kernel**2 * self.shape[0] * self.row.maps * height * width * self.images


def products(nets: Networks, images: int) -> Iterator[Product]:
    """All convolutions of one step.

    D sees both joints and is gone back through twice, for L_D's weights and for L_G's inputs; its first layers pass a
    gradient on for L_G alone, and x needs none, so half of the first image layer's would do.
    """
    for name, (shape, rows) in nets.parts().items():
        judge = name.startswith("discriminator")
        for i, (row, size) in enumerate(zip(rows, [shape, *plane_shapes(shape, rows)], strict=False)):
            first = i == 0 and name != "discriminator_joint"
            back = (1 if first else 2) if judge else (0 if first else 1)
            half = judge and first
            yield Product(f"{name} {i + 1}", row, size, images * (2 if judge else 1), 1, 0 if half else back, 1)
            if half:
                yield Product(f"{name} {i + 1}", row, size, images, 0, 1, 0)


def seconds(call: Callable[[], object]) -> float:
    """Median of a few repeats of a call."""
    call()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < REPEATS or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def forms(product: Product, device: torch.device) -> dict[str, list[Callable[[], Tensor]]]:
    """For each of the three products, calls that compute it in bfloat16: as a convolution or a matrix product."""
    row, (channels, height, width), n = product.row, product.shape, product.images
    out = (row.maps, *plane_shapes(product.shape, [row])[0][1:])  # maxout halves the maps only later
    like = {"dtype": torch.bfloat16, "device": device}
    x, dy = (
        torch.randn(n, *size, **like).contiguous(memory_format=torch.channels_last) for size in (product.shape, out)
    )
    weight_shape = (channels, row.maps) if row.transposed else (row.maps, channels)
    weight = torch.randn(*weight_shape, row.kernel, row.kernel, **like).contiguous(memory_format=torch.channels_last)
    settings = (None, [row.stride] * 2, [0, 0], [1, 1], row.transposed, [0, 0], 1)

    def back(mask: list[bool]) -> Callable[[], Tensor]:
        return lambda: torch.ops.aten.convolution_backward(dy, x, weight, *settings, mask)

    convolve = F.conv_transpose2d if row.transposed else F.conv2d
    calls = {
        "forward": [lambda: convolve(x, weight, stride=row.stride)],
        "input_grad": [back([True, False, False])],
        "weight_grad": [back([False, True, False])],
    }
    # The matrix product that the convolution amounts to, its patches given: what it costs without gathering them.
    pixels = n * (height * width if row.transposed else out[1] * out[2])
    inner, outer = (channels, row.kernel**2 * row.maps) if row.transposed else (row.kernel**2 * channels, row.maps)
    a, w, d = torch.randn(pixels, inner, **like), torch.randn(inner, outer, **like), torch.randn(pixels, outer, **like)
    calls["forward"].append(lambda: a @ w)
    calls["input_grad"].append(lambda: d @ w.T)
    calls["weight_grad"].append(lambda: a.T @ d)
    return calls


def floor(nets: Networks, images: int, device: torch.device) -> tuple[float, float, list[dict[str, object]]]:
    """FLOPs and seconds of all products of a step, each alone in its best form, and a row for each layer."""
    flops, total, rows = 0.0, 0.0, []
    for product in products(nets, images):
        calls, line = forms(product, device), {"layer": product.layer, "images": product.images}
        for name in ("forward", "input_grad", "weight_grad"):
            if times := getattr(product, name):
                best = min(seconds(call) for call in calls[name])
                line[name] = {"times": times, "seconds": best, "flops_per_s": product.flops / best}
                flops, total = flops + times * product.flops, total + times * best
        rows.append(line)
    return flops, total, rows
