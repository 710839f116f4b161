"""One peer in a process of its own: converts its format, checks what it delivers, or measures it.

`python -m ali_dist.bench.reader TASK.json` writes its result as JSON to the task's `result`. It imports nothing that a
peer's environment lacks.
"""

import gc
import itertools
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ali_dist.bench.peers import PEERS, Batch, Epochs, Peer
from ali_dist.bench.processes import busy_seconds, cpu_seconds, reset_peak, resident_bytes


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    peer, folder = PEERS[task["peer"]], Path(task["folder"])
    match task["do"]:
        case "convert":
            peer.convert(Path(task["source"]), folder)
            result = {}
        case "check":
            result = contents(peer.open(folder, max(peer.workers)), tuple(task["shape"]))
        case "measure":
            result = measure(peer, folder, task["workers"], task["seconds"], task["steady"])
    Path(task["result"]).write_text(json.dumps(result))


def contents(batches: Epochs, shape: tuple[int, ...]) -> dict[str, Any]:
    """What an epoch holds, in whatever order: images, images of each class, and the sum of the images' CRC-32, each
    continued from its label's. ValueError for batches that are not uint8 [n, *shape] and n labels.
    """
    images, digest, labels = 0, 0, Counter()
    for x, y in batches:
        if x.dtype != torch.uint8 or x.shape[1:] != shape or y.shape != x.shape[:1]:
            raise ValueError(f"it delivers {x.dtype} {list(x.shape)} and labels {list(y.shape)}")
        for image, label in zip(np.ascontiguousarray(x.numpy()), y.tolist(), strict=True):
            digest += zlib.crc32(image, zlib.crc32(label.to_bytes(8, "little", signed=True)))
            labels[label] += 1
        images += len(y)
    return {"images": images, "labels": {str(label): labels[label] for label in sorted(labels)}, "digest": digest}


def measure(peer: Peer, folder: Path, workers: int, seconds: float, steady: bool) -> dict[str, Any]:
    """`first_batch_s`, from the import of the peer's library on in a process that has PyTorch; then two spans:
    `first`, the rest of the first epoch, at most `seconds`, and, if `steady`, the `seconds` after that, over as many
    epochs as they take; `memory`, bytes resident at most beyond those of the process with PyTorch alone.
    """
    gc.collect()
    reset_peak()
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    epochs = peer.open(folder, workers)
    batches = iter(epochs)
    next(batches)
    result: dict[str, Any] = {"first_batch_s": time.perf_counter() - started}
    result["first"] = span(batches, seconds)
    if steady:
        result["steady"] = span(itertools.chain(batches, itertools.chain.from_iterable(forever(epochs))), seconds)
    result["memory"] = resident_bytes("VmHWM") - before
    return result


def forever(epochs: Epochs) -> Iterator[Epochs]:
    while True:
        yield epochs


def span(batches: Iterator[Batch], seconds: float) -> dict[str, float]:
    """Images of so many seconds, or until the batches end; CPU seconds of this process and its children, and those of
    everything else on the machine meanwhile, also of other virtual machines as far as the kernel is told of it.
    `ended`: whether the batches did.
    """
    images, ended, cpu, busy, started = 0, True, cpu_seconds(), busy_seconds(), time.perf_counter()
    for _, y in batches:
        images += len(y)
        if time.perf_counter() - started >= seconds:
            ended = False
            break
    wall, cpu, busy = time.perf_counter() - started, cpu_seconds() - cpu, busy_seconds() - busy
    others = max(0.0, busy - cpu) / wall
    return {"images": images, "seconds": wall, "cpu_seconds": cpu, "others": others, "ended": ended}


if __name__ == "__main__":
    main()
