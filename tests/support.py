"""What several tests share: small recipes, batches, and real gloo ranks."""

import dataclasses
import io
import multiprocessing
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ali_dist import fast, worker
from ali_dist.data.stream import Batch
from ali_dist.recipe import Optim, Recipe, Schedule, Semi
from ali_dist.recipes import RECIPES
from ali_dist.tables import NETWORKS, Networks, Row, classifying, conditional

WIDTH = 16  # the small networks have a sixteenth of the digits' maps


def _change(nets: Networks, change: Callable[[Row], Row], **fields: Any) -> Networks:
    rows = {name: tuple(change(row) for row in rows) for name, (_, rows) in nets.parts().items()}
    return dataclasses.replace(nets, **rows, **fields)


def _narrow(row: Row) -> Row:
    return row if row.maps <= 3 else dataclasses.replace(row, maps=max(2, row.maps // WIDTH))


def _dry(row: Row) -> Row:
    return dataclasses.replace(row, dropout=0.0)


SMALL = _change(NETWORKS["digits"], _narrow, latent=4)
NETWORKS["small"] = SMALL
NETWORKS["small-dry"] = _change(SMALL, _dry)
NETWORKS["small-conditional"] = conditional(SMALL, 10)
NETWORKS["small-conditional-dry"] = conditional(NETWORKS["small-dry"], 10)
NETWORKS["small-attributes"] = conditional(SMALL, 3)
NETWORKS["small-classes"] = classifying(SMALL, 10)
NETWORKS["small-classes-dry"] = classifying(NETWORKS["small-dry"], 10)
NETWORKS["small-alone"] = _change(NETWORKS["cifar10"], _narrow, latent=4)  # D has no batch norm
NETWORKS["small-alone-dry"] = _change(NETWORKS["small-alone"], _dry)
NETWORKS["small-alone-conditional"] = conditional(NETWORKS["small-alone"], 10)
NETWORKS["small-alone-classes"] = classifying(NETWORKS["small-alone"], 10)
NETWORKS["digits-dry"] = _change(NETWORKS["digits"], _dry)


def recipe(**changes: Any) -> Recipe:
    """The digits recipe with small networks in float32 and batches of 8; fields by name, wherever they belong."""
    base = RECIPES["digits"]
    fixed = {"networks": "small", "precision": "fp32", "batch_size": 8, "lr": 3e-4, "ema_half_life": 5_000}
    changes = {**fixed, **changes}
    parts = {}
    for name, part in (("optim", Optim), ("schedule", Schedule), ("semi", Semi)):
        own = {f.name: changes.pop(f.name) for f in dataclasses.fields(part) if f.name in changes}
        parts[name] = dataclasses.replace(getattr(base, name), **own)
    return dataclasses.replace(base, **parts, **changes)


def batch(
    size: int, rows: list[int] | None = None, shape: tuple[int, ...] = (1, 32, 32), seed: int = 0, labelled: int = 0
) -> Batch:
    """The given rows (default: all) of a random global batch; given `labelled`, only its last rows have a class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator)
    index = torch.arange(size) if rows is None else torch.tensor(rows)
    y = torch.where(index < size - labelled, -1, index % 10) if labelled else index % 10
    return Batch(x=x[index], y=y, rows=index, size=size)


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, and the same bits under each."""
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not differing


def greatest_difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    return max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine)


@contextmanager
def in_float64() -> Iterator[None]:
    """All of the core computes in float64, also where it says `.float()`."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


class Ranks:
    """Processes that run functions as the ranks of a gloo group, started once for many calls."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ali_dist.worker"])  # PyTorch is imported once, and not by each
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, world: int, function: Callable, *args: Any) -> list[Any]:
        """`function(rank, *args)` on each of `world` ranks; what they return, in rank order."""
        meeting = str(Path(self.folder.name) / uuid.uuid4().hex)
        for rank, pipe in enumerate(self.pipes[:world]):
            pipe.send((function, rank, world, meeting, args))
        answers = [pipe.recv() for pipe in self.pipes[:world]]
        errors = [text for ok, text in answers if not ok]
        assert not errors, "\n".join(errors)
        return [torch.load(io.BytesIO(data), weights_only=True) for _, data in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world, meeting, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.distributed.init_process_group(
                "gloo", f"file://{meeting}", timedelta(seconds=60), rank=rank, world_size=world
            )
            buffer = io.BytesIO()
            torch.save(function(rank, *args), buffer)
            pipe.send((True, buffer.getvalue()))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        finally:
            torch.distributed.destroy_process_group()


def when_reaching(monkeypatch, num_images: int, action) -> None:
    """Calls `action` before the update that begins there."""
    original = fast.step

    def reaching(state, batches):
        if state.num_images == num_images:
            action()
        return original(state, batches)

    monkeypatch.setattr(fast, "step", reaching)


def poisoned(monkeypatch) -> None:
    """A weight is NaN when training begins."""
    original = worker.train

    def train(state, *args, **named):
        state.model.decoder[0].weight.data.fill_(float("nan"))
        return original(state, *args, **named)

    monkeypatch.setattr(worker, "train", train)
