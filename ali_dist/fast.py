"""Updates through fixed buffers, so that one CUDA graph holds a whole one: both losses, both Adams, averages, measures.

What changes from one update to the next is written into tensors that the graph reads: images, noise, dropout's [seed,
step], the averages' weight and the learning rates. Nothing comes back before `settle`, so that the device never waits.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ali_dist.data.stream import Batch
from ali_dist.dist import gather, start_sum
from ali_dist.meter import Meter
from ali_dist.state import TrainState
from ali_dist.step import (
    Inputs,
    both_losses,
    clear_gradients,
    flat_norms,
    prepare,
    report_losses,
    step,
    through_generator,
)
from ali_dist.streams import branch, join
from ali_dist.supervised import supervised_step

log = logging.getLogger(__name__)

WARM_UP = 3  # updates without a graph, in which kernels are compiled, libraries started and their memory taken


class Advance(Protocol):
    """Makes one update a call."""

    def __call__(self, batches: Sequence[Batch]) -> None: ...

    def settle(self) -> None:
        """What is launched after this sees all updates; the meter gets their measures."""


@contextmanager
def convolutions_tuned(on: bool) -> Iterator[None]:
    """cuDNN times its algorithms for what is new to it in the body."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class PlainUpdates:
    """The step as it is written, one launch after the other."""

    def __init__(self, state: TrainState, meter: Meter) -> None:
        self.state, self.meter = state, meter
        self.step = supervised_step if state.recipe.semi.supervised_only else step

    def __call__(self, batches: Sequence[Batch]) -> None:
        for values in self.step(self.state, batches):
            self.meter.report(values)

    def settle(self) -> None:
        pass


class StaticUpdates:
    """The same step on fixed buffers; where there is a GPU, its first updates are launched, the others replayed.

    An update whose loss or gradient is not finite moves nothing, nor does any after it; `state.finite` tells. Where
    Adam is overlapped the discriminator may already have moved in it.
    """

    def __init__(self, state: TrainState, meter: Meter) -> None:
        self.state, self.meter = state, meter
        device, self.gpu = state.device, state.device.type == "cuda"
        self.measures = Meter(device)
        self.inputs: list[Inputs] = []
        self.weight = torch.zeros((), device=device)  # of the averages
        self.skip = torch.zeros((), device=device)
        for optimizer in state.optimizers.values():
            optimizer.found_inf = self.skip
        self.updates, self.graph, self.failure = 0, None, ""
        self.run: Callable[[], None] = self.update
        self.stream, self.side = (torch.cuda.Stream(device) if self.gpu else None for _ in range(2))
        if state.levers.branches:
            state.model.branch_on(self.side)

    def __call__(self, batches: Sequence[Batch]) -> None:
        state = self.state
        given = [prepare(state, batch, micro) for micro, batch in enumerate(batches)]
        # The updates have a stream of their own, as capture wants it; what copies to the device comes first.
        with branch(self.stream), convolutions_tuned(state.levers.tune_convolutions):
            if self.gpu and self.updates == WARM_UP:
                self.capture()
            self.fill(given, batches[0].size)
            self.run()
        self.updates += 1
        state.num_images += state.recipe.optim.batch_size

    def fill(self, given: list[Inputs], size: int) -> None:
        """Writes all that this update needs and the last did not have."""
        if not self.inputs:
            self.size, self.inputs = size, [Inputs(*(tensor.clone() for tensor in inputs)) for inputs in given]
        for mine, theirs in zip(self.inputs, given, strict=True):
            for target, source in zip(mine, theirs, strict=True):
                if target.shape != source.shape:
                    raise RuntimeError(f"an update's inputs changed from {target.shape} to {source.shape}")
                target.copy_(source)
                if self.stream is not None:
                    source.record_stream(self.stream)
        state = self.state
        self.weight.fill_(state.averaging_weight(state.num_images + state.recipe.optim.batch_size))
        for optimizer in state.optimizers.values():
            optimizer.write_rates()

    def update(self) -> None:
        """One update from the fixed buffers: the same launches each time, and nothing read back."""
        state, reports, last = self.state, [], len(self.inputs) - 1
        clear_gradients(state)
        for micro, inputs in enumerate(self.inputs):
            out, measures = both_losses(state, inputs, self.size, 1 / (self.size * len(self.inputs)))
            reports.append(measures)
            if micro == last:
                finish = self.start_discriminator(reports)
            through_generator(state, out)
        with torch.no_grad():
            finish()
            state.average_weights(self.weight * (1 - self.skip))

    @torch.no_grad()
    def start_discriminator(self, reports: list[dict[str, Tensor]]) -> Callable[[], None]:
        """What D's gradient allows beside encoder's and decoder's backward pass: its sum over ranks, perhaps its Adam.

        Returns what is left for after that pass.
        """
        state = self.state
        optimizer, others = state.optimizers["discriminator"], state.optimizers["generator"]
        (gradient,) = optimizer.gather()
        wait = start_sum(gradient, state.levers.bf16_gradients)
        sums, overlap = report_losses(reports), state.levers.overlap_adam

        def norms_of_d() -> dict[str, Tensor]:
            wait()
            return flat_norms(state, "discriminator", gradient)

        if overlap:
            with branch(self.side):
                of_d = norms_of_d()
                self.skip_unless_finite(of_d | sums)
                optimizer.step()

        def finish() -> None:
            (theirs,) = others.gather()
            start_sum(theirs, state.levers.bf16_gradients)()
            norms = flat_norms(state, "generator", theirs)
            if overlap:
                join(self.side)
            norms |= of_d if overlap else norms_of_d()
            state.finite.note(norms | sums)
            self.skip.copy_(state.finite.flags.amin() == 0)
            if not overlap:
                optimizer.step()
            others.step()
            for values in [*reports, norms]:
                self.measures.report(values)

        return finish

    def skip_unless_finite(self, values: dict[str, Tensor]) -> None:
        """What `state.finite` will find later; on every rank alike."""
        bad = ~torch.isfinite(torch.stack([value.float() for value in values.values()])).all()
        self.skip.copy_(torch.maximum(self.skip, gather(bad.to(torch.uint8)).amax()))

    def capture(self) -> None:
        """Records an update as a graph, which makes none; goes on without, and says so, where that fails."""
        torch.cuda.synchronize(self.state.device)
        graph = torch.cuda.CUDAGraph()
        clear_gradients(self.state)
        try:
            # Other threads, which read data and watch collectives, may go on with calls that capture forbids.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.update()
        except Exception as error:  # whatever CUDA, NCCL or a library may refuse
            self.failure = f"{type(error).__name__}: {error}".split("\n")[0]
            torch.cuda.synchronize(self.state.device)
        failed = torch.tensor([bool(self.failure)], dtype=torch.uint8, device=self.state.device)
        if gather(failed).any():  # a graph with collectives must be every rank's or none's
            self.failure = self.failure or "another worker could not"
            log.warning(f"updates are not one CUDA graph and so slower ({self.failure}); --no-fast does without trying")
            return
        self.graph, self.run = graph, graph.replay

    def settle(self) -> None:
        join(self.stream)
        self.meter.take(self.measures)


def updates_of(state: TrainState, meter: Meter) -> Advance:
    """The fastest way that this state allows."""
    return (StaticUpdates if state.static else PlainUpdates)(state, meter)
