"""What the arithmetic of a step costs when each of its products runs alone in its best form."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ali_dist.tables import Networks, Row, plane_shapes

REPEATS, SECONDS = 5, 0.2
CALLS = 20  # of a product in a graph


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
    def moved(self) -> int:
        """Bytes that the products and what surrounds them move at least, with activations in bfloat16.

        Each product reads and writes both of its sides; batch norm or bias, activation and dropout take two passes over
        the output forward and three in each backward pass.
        """
        _, height, width = plane_shapes(self.shape, [self.row])[0]
        out = self.row.maps * height * width
        sides = math.prod(self.shape) + out
        passes = 2 * self.forward + 3 * self.forward * max(1, self.input_grad)
        products = self.forward + self.input_grad + self.weight_grad
        return 2 * self.images * (products * sides + passes * out)

    @property
    def flops(self) -> int:
        """Of one of the three products, 2 a multiply-add."""
        _, height, width = self.shape if self.row.transposed else plane_shapes(self.shape, [self.row])[0]
        return 2 * self.row.kernel**2 * self.shape[0] * self.row.maps * height * width * self.images


def products(nets: Networks, images: int) -> Iterator[Product]:
    """All convolutions of one step.

    D sees both joints and is gone back through twice, for L_D's weights and for L_G's inputs, or once where it judges
    pairs alone; its first layers pass a gradient on for L_G alone, and x needs none, so half of the first image layer's
    would do.
    """
    sweeps = 1 if nets.judges_pairs_alone else 2
    for name, (shape, rows) in nets.parts().items():
        judge = name.startswith("discriminator")
        for i, (row, size) in enumerate(zip(rows, [shape, *plane_shapes(shape, rows)], strict=False)):
            first = i == 0 and name != "discriminator_joint"
            back = (1 if first else sweeps) if judge else (0 if first else 1)
            half = judge and first
            yield Product(f"{name} {i + 1}", row, size, images * (2 if judge else 1), 1, 0 if half else back, 1)
            if half:
                yield Product(f"{name} {i + 1}", row, size, images, 0, 1, 0)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy of 256 MB reads and writes."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


ADAM_BYTES = 30 + 12  # a parameter: Adam with a bfloat16 copy, and the averaged weights


def memory_floor(nets: Networks, images: int, parameters: int, device: torch.device) -> dict[str, float]:
    """What a step must move at least, and how long a copy of as much takes."""
    moved = sum(product.moved for product in products(nets, images)) + ADAM_BYTES * parameters
    rate = copy_rate(device)
    return {"bytes": moved, "bytes_per_s": rate, "seconds": moved / rate}


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """Of a call by itself, without the time to launch it: from a CUDA graph of many."""
    stream, graph, times = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e-3 * start.elapsed_time(end) / CALLS)
    return median(times)


def seconds(call: Callable[[], object]) -> float:
    """Median of a few repeats of a call."""
    if torch.cuda.is_available():
        return seconds_on_gpu(call)
    call()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < REPEATS or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        call()
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


@dataclass(frozen=True, slots=True)
class Floor:
    """All products of a step, each alone in its best form."""

    flops: float
    seconds: float
    rows: list[dict[str, object]]
    """One a layer."""
    calls: list[tuple[int, Callable[[], Tensor]]]
    """How often a product is made, and its best form."""

    def again(self) -> float:
        """Seconds of all of them now, on a CPU: of each the second of two calls, so that its caches are as warm."""
        total = 0.0
        for times, call in self.calls:
            call()
            start = time.perf_counter()
            call()
            total += times * (time.perf_counter() - start)
        return total


def floor(nets: Networks, images: int, device: torch.device) -> Floor:
    """Finds every product's best form, and times it."""
    flops, total, rows, best_calls = 0.0, 0.0, [], []
    torch.backends.cudnn.benchmark = True  # a convolution's best form is that of its fastest algorithm
    for product in products(nets, images):
        calls, line = forms(product, device), {"layer": product.layer, "images": product.images}
        for name in ("forward", "input_grad", "weight_grad"):
            if times := getattr(product, name):
                best, best_call = min(((seconds(call), call) for call in calls[name]), key=lambda pair: pair[0])
                best_calls.append((times, best_call))
                line[name] = {"times": times, "seconds": best, "flops_per_s": product.flops / best}
                flops, total = flops + times * product.flops, total + times * best
        rows.append(line)
    torch.backends.cudnn.benchmark = False
    return Floor(flops, total, rows, best_calls)
