"""The training loop: fetch, update, count; once per tick: log, save, ask to stop."""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ali_dist import checkpoint, dist
from ali_dist.data.index import Index
from ali_dist.data.labelled import SemiSupervised
from ali_dist.data.stream import Stream
from ali_dist.fast import Advance, updates_of
from ali_dist.meter import Meter, Sinks
from ali_dist.patience import patiently
from ali_dist.pictures import save_png
from ali_dist.run import RunFolder
from ali_dist.state import TrainState
from ali_dist.watch import Grids, class_errors, validate
from ali_dist.watchdog import Watchdog

log = logging.getLogger(__name__)

OnTick = Callable[[int, dict[str, float]], None]
SECONDS_BETWEEN_STOP_CHECKS = 1.0


class Clock:
    """Says which of the schedule's intervals an update has crossed; all are counted in images."""

    def __init__(self, num_images: int) -> None:
        self.before = self.now = num_images

    def advance(self, num_images: int) -> None:
        self.before, self.now = self.now, num_images

    def crossed(self, interval: int) -> bool:
        return self.before // interval != self.now // interval


class Pace:
    """Speed since the last tick, pauses left out, and what follows from it: how often to save and to ask to stop."""

    def __init__(self, state: TrainState, stream: Stream | SemiSupervised, watchdog: Watchdog) -> None:
        self.state, self.stream, self.watchdog = state, stream, watchdog
        self.updates_between_stop_checks = 1
        self.saved_at, self.save_seconds = state.num_images, 0.0  # seconds of the last save, on rank 0
        self.images_between_saves = state.recipe.schedule.tick_images  # until one has been timed
        self.restart()

    def restart(self) -> None:
        self.start, self.images = time.perf_counter(), self.state.num_images
        self.waited = self.stream.wait_seconds

    def save_is_due(self, clock: Clock) -> bool:
        fixed = self.state.recipe.schedule.save_images
        return clock.crossed(fixed) if fixed else clock.now - self.saved_at >= self.images_between_saves

    @contextmanager
    def pause(self, kind: str | None = None) -> Iterator[None]:
        """Its body's seconds count as no training time; the watchdog looks after it only if it has a name."""
        begin = time.perf_counter()
        with self.watchdog.during(kind) if kind else self.watchdog.paused():
            yield
        self.start += time.perf_counter() - begin

    def measure(self) -> dict[str, float]:
        """The numbers of the tick that ends here."""
        seconds = time.perf_counter() - self.start
        images = self.state.num_images - self.images
        updates = images / self.state.recipe.optim.batch_size
        # All ranks must ask after the same update, so rank 0's clock decides for all.
        per_check = dist.from_rank0(SECONDS_BETWEEN_STOP_CHECKS * updates / seconds, self.state.device)
        self.updates_between_stop_checks = max(1, round(per_check))
        schedule = self.state.recipe.schedule
        if schedule.save_images is None:
            failures = 3600 * checkpoint.HOURS_BETWEEN_FAILURES / dist.world_size()
            interval = min(checkpoint.best_interval(self.save_seconds, failures), checkpoint.LONGEST_INTERVAL)
            apart = max(schedule.tick_images, round(interval * images / seconds))
            self.images_between_saves = int(dist.from_rank0(apart, self.state.device))
        numbers = {
            "speed/images_per_s": images / seconds,
            "speed/images_per_s_per_worker": images / seconds / dist.world_size(),
            "speed/data_wait_share": (self.stream.wait_seconds - self.waited) / seconds,
            "speed/update_ms": 1000 * seconds / updates,
            "memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if self.state.device.type == "cuda":
            numbers["memory/device_gib"] = torch.cuda.max_memory_allocated(self.state.device) / 2**30
        self.restart()
        return numbers


def train(
    state: TrainState,
    stream: Stream | SemiSupervised,
    index: Index,
    run: RunFolder,
    *,
    should_stop: Callable[[], bool],
    on_tick: OnTick,
    skip: Collection[int] = (),
) -> Path | None:
    """Trains to the schedule's end, or until `should_stop` says so on rank 0; returns the last checkpoint.

    Every rank runs this, and asks `should_stop` after the same updates. Only rank 0 writes to the run's folder, with
    patience; UserError when that is at an end. The batches that begin at the images in `skip` move the clock
    alone. NonFinite leaves the last checkpoint.
    """
    with Watchdog() as watchdog:
        return _train(state, stream, index, run, should_stop, on_tick, skip, watchdog)


def _train(
    state: TrainState,
    stream: Stream | SemiSupervised,
    index: Index,
    run: RunFolder,
    should_stop: Callable[[], bool],
    on_tick: OnTick,
    skip: Collection[int],
    watchdog: Watchdog,
) -> Path | None:
    recipe, schedule = state.recipe, state.recipe.schedule
    meter, clock = Meter(state.device), Clock(state.num_images)
    sinks = grids = last_save = None
    if dist.rank() == 0:
        sinks = Sinks(run.ticks, run.tensorboard, state.num_images)
        sinks.text("recipe", f"```\n{json.dumps(recipe.to_json(), indent=2)}\n```")
        grids = Grids(index, state)
        if state.num_images == 0:
            show(grids, sinks, run, state)
    update, pauses = updates_of(state, meter), (schedule.tick_images, schedule.validate_images, schedule.sample_images)
    updates, stopping, pace, begun = 0, False, Pace(state, stream, watchdog), []
    while state.num_images < schedule.num_images and not stopping:
        batches = [next(stream) for _ in range(recipe.optim.accumulate)]
        if state.num_images in skip:
            state.num_images += recipe.optim.batch_size
        else:
            begun.append(state.num_images)
            update(batches)
        clock.advance(state.num_images)
        watchdog.beat()
        updates += 1
        asking = updates % pace.updates_between_stop_checks == 0
        if asking:
            stopping = bool(dist.from_rank0(float(should_stop()), state.device))
        finished = state.num_images >= schedule.num_images
        ticking = finished or stopping or clock.crossed(schedule.tick_images)
        if asking or ticking or any(clock.crossed(interval) for interval in pauses):
            check(state, update, begun)
        if ticking:
            scalars = meter.collect() | pace.measure() | damage(stream, state.device) | skipped(skip, state.num_images)
            if sinks:
                sinks.scalars(scalars, state.num_images)
                log.info(status_line(scalars, state.num_images, schedule.num_images))
            on_tick(state.num_images, scalars)
        if finished or stopping or pace.save_is_due(clock):
            check(state, update, begun)
            with pace.pause():
                if dist.rank() == 0:
                    last_save, pace.save_seconds = save(run, state)
                pace.saved_at = state.num_images
                dist.barrier()
        if finished or (clock.crossed(schedule.validate_images) and not stopping):
            with pace.pause("validation"):
                scalars = judge(state, index)
            if sinks:
                sinks.scalars(scalars, state.num_images)
        if sinks and (finished or (clock.crossed(schedule.sample_images) and not stopping)):
            with pace.pause("drawing"):
                show(grids, sinks, run, state)
    if sinks:
        sinks.close()
        run.record("end", state.num_images)
    return last_save


def check(state: TrainState, update: Advance, begun: list[int]) -> None:
    """Waits for the device; NonFinite when an update since the last call, begun at these images, was not finite."""
    update.settle()
    state.finite.check(begun)
    begun.clear()


def save(run: RunFolder, state: TrainState) -> tuple[Path, float]:
    """The new checkpoint, and the seconds it took."""
    begin = time.perf_counter()
    path = patiently(lambda: checkpoint.save(run, state), f"save a checkpoint in {run.checkpoints}")
    seconds = time.perf_counter() - begin
    run.record("save", state.num_images, seconds=seconds)
    return path, seconds


def judge(state: TrainState, index: Index) -> dict[str, float]:
    """The validation sample's measures, and the test error where D tells classes apart; on every rank."""
    semi = state.recipe.semi
    scalars = {} if semi.supervised_only else validate(state, index)
    if semi.labels:
        errors = class_errors(state, index)
        scalars |= errors
        if dist.rank() == 0:
            averaged, raw = (100 * error for error in errors.values())
            log.info(
                f"{state.num_images:>10,} images: test error {averaged:.2f} % (averaged weights), {raw:.2f} % (raw)"
            )
    return scalars


def damage(stream: Stream | SemiSupervised, device: torch.device) -> dict[str, float]:
    """Where --on-bad-shard is skip: shards that any worker has found damaged, and images that stood for theirs."""
    reader = stream.reader
    if reader is None or not reader.index.skip_bad:
        return {}
    found = [shard.name in reader.bad for shard in reader.shards]
    rows = dist.gather(torch.tensor([reader.replaced, *found], dtype=torch.int64, device=device))  # [W, 1 + shards]
    return {"data/replaced_images": rows[:, 0].sum().item(), "data/bad_shards": rows[:, 1:].amax(0).sum().item()}


def skipped(skip: Collection[int], num_images: int) -> dict[str, float]:
    """The number of batches left out so far, where there are any."""
    count = sum(begin < num_images for begin in skip)
    return {"data/skipped_batches": float(count)} if count else {}


def show(grids: Grids, sinks: Sinks, run: RunFolder, state: TrainState) -> None:
    """Draws the grids into figures/ and TensorBoard."""
    for name, pixels in grids.draw(state).items():
        path = run.figures / f"{name}-{state.num_images:012d}.png"
        patiently(partial(save_png, path, pixels), f"write {path}")
        sinks.image(name, pixels, state.num_images)


def status_line(scalars: dict[str, float], num_images: int, total: int) -> str:
    seconds_left = max(0, total - num_images) / scalars["speed/images_per_s"]
    hours, minutes = divmod(round(seconds_left / 60), 60)
    eta = f"{hours}h{minutes:02d}m" if seconds_left >= 60 else f"{seconds_left:.0f}s"
    names = {"L_D": "loss/d", "L_G": "loss/g", "L_labelled": "loss/labelled", "error": "error/labelled"}
    losses = "".join(f"{short} {scalars[name]:.3f}  " for short, name in names.items() if name in scalars)
    if "accuracy/data" in scalars:
        losses += f"acc {scalars['accuracy/data']:.2f}/{scalars['accuracy/sample']:.2f}  "
    return (
        f"{num_images:>10,} / {total:,} images  {100 * num_images / total:5.1f} %  {losses}"
        f"{scalars['speed/images_per_s']:,.0f} img/s  wait {100 * scalars['speed/data_wait_share']:.1f} %  "
        f"{scalars['memory/host_gib']:.1f} GiB  ETA {eta}"
        + "".join(
            f"  {scalars[name]:.0f} {words}"
            for name, words in (("data/bad_shards", "BAD SHARDS"), ("data/skipped_batches", "SKIPPED BATCHES"))
            if scalars.get(name)
        )
    )


class RunLog(logging.FileHandler):
    """log.txt; what a full disk or a storage out of reach keeps it from writing is still on stderr."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def log_to(path: Path | None) -> None:
    """Sends the package's log to stderr, and on rank 0 to the run's log.txt."""
    logger = logging.getLogger("ali_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path:
        handlers.append(RunLog(path))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
