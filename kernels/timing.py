"""Times calls on a CUDA device: inputs rotated past the second-level cache, CUDA-graph replays, medians with spread.

A case is the same call on several sets of inputs, together more than twice the cache, one after the other; outputs
are kept until the last has run, so they too are new memory. All of it is on one stream of our own, because autograd
runs backward on forward's stream and a capture allows no other.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from unittest.mock import patch

import torch
import torch._functorch.config
import torch.nn.functional as F

from kernels.gate import differentiable
from kernels.ops import Inputs, Op

WARM_UP, REPEATS, MAX_SETS = 3, 50, 256
COPY_BYTES = 1 << 29
Calls = list[Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds a call: the median of the repeats, and their quartiles."""

    median: float
    low: float
    high: float


def num_sets(bytes_moved: int) -> int:
    """Sets of inputs that together pass the second-level cache twice."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MAX_SETS, max(2, 2 * cache // max(1, bytes_moved) + 1))


def repeat(run: Callable[[], object], num_calls: int) -> Time:
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = run()
        end.record()
        end.synchronize()
        del kept
        times.append(start.elapsed_time(end) / 1e3 / num_calls)
    low, median, high = quantiles(times, n=4)
    return Time(median, low, high)


def launched(calls: Calls) -> Time:
    """Launched one by one from Python, as in a program without CUDA graphs."""
    return repeat(lambda: [call() for call in calls], len(calls))


def replayed(calls: Calls) -> Time:
    """Captured together in one CUDA graph and replayed: what the device takes, without the launching."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [call() for call in calls]
    time = repeat(graph.replay, len(calls))
    del kept
    return time


def measure(calls: Calls) -> dict[str, Time | str]:
    """Both times; in the place of one that cannot be had, what went wrong."""
    results: dict[str, Time | str] = {}
    for name, way in (("launched", launched), ("graph", replayed)):
        try:
            for _ in range(WARM_UP):
                calls[0]()
            torch.cuda.synchronize()
            results[name] = way(calls)
        except Exception as failure:  # a peer that does not run is a result, not the end of the benchmark
            torch.cuda.synchronize()
            results[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    return results


@contextmanager
def native_dropout(op: Op) -> Iterator[None]:
    """Peers use PyTorch's own dropout: only the kernels need the masks that the reference draws in plain torch."""
    module = sys.modules[op.reference.__module__]
    if not hasattr(module, "dropout_ref"):
        yield
        return
    with patch.object(module, "dropout_ref", lambda x, p, rng, offset: F.dropout(x, p)):
        yield


def calls_of(function: Callable, sets: list[Inputs], options: dict[str, object], backward: bool) -> Calls:
    """The calls to time: the function on each set, or the gradients of its outputs."""
    if not backward:
        return [lambda inputs=inputs: function(**inputs, **options) for inputs in sets]
    calls = []
    for inputs in sets:
        outputs = differentiable(function(**inputs, **options))
        wanted = [value for value in inputs.values() if value is not None and value.requires_grad]
        seeds = [torch.randn_like(y) for y in outputs]
        calls.append(
            lambda outputs=outputs, wanted=wanted, seeds=seeds: torch.autograd.grad(
                outputs, wanted, seeds, retain_graph=True, allow_unused=True
            )
        )
    return calls


def time_case(
    op: Op, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, object], backward: bool
) -> dict[str, dict[str, Time | str]]:
    """The times of the op ("ours") and of each peer on one shape, forward or backward."""
    cost = op.cost(shape, dtype, **options)
    count = num_sets(cost.backward_bytes if backward else cost.forward_bytes)
    results = {}
    stream = torch.cuda.Stream()
    # Compiled backwards may otherwise free what a second backward through the same outputs needs.
    with torch.cuda.stream(stream), torch._functorch.config.patch(donated_buffer=False):
        sets = [op.inputs(shape, dtype, "cuda") for _ in range(count)]
        kernels = {"ours": lambda **inputs: op.function(**inputs, impl="triton")}
        torch.compiler.reset()
        peers = {"eager": op.reference, "compile": torch.compile(op.reference, dynamic=False), **op.rivals}
        for name, function in (kernels | peers).items():
            with native_dropout(op):
                try:
                    results[name] = measure(calls_of(function, sets, options, backward))
                except Exception as failure:  # in the forward pass that its backward needs
                    failed = f"{type(failure).__name__}: {failure}"
                    results[name] = {"launched": failed, "graph": failed}
            torch.cuda.empty_cache()
        torch.cuda.synchronize()
    return results


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of copying tensors far larger than the cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pairs = [torch.empty(2, COPY_BYTES, dtype=torch.uint8, device="cuda").unbind() for _ in range(2)]
        calls = [lambda to=to, source=source: to.copy_(source) for to, source in pairs]
        for call in calls:
            call()
        return 2 * COPY_BYTES / replayed(calls).median
