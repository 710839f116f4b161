import contextlib
import dataclasses
import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import assert_same, greatest_difference, recipe

from ali_dist import checkpoint, fast, loop
from ali_dist.data.index import load_index
from ali_dist.data.pack import new_folder, pack
from ali_dist.data.stream import Stream
from ali_dist.data.table import DATASETS
from ali_dist.data.types import SHARD, OpenSource
from ali_dist.finite import NonFinite
from ali_dist.loop import Clock, log_to, status_line, train
from ali_dist.meter import read_ticks
from ali_dist.run import RunFolder, read_lines
from ali_dist.state import TrainState

INTERVALS = {
    "tick_images": 25,
    "save_images": 40,
    "sample_images": 33,
    "validate_images": 50,
    "validate_count": 16,
    "keep": 10,
}


DIGITS = DATASETS["digits"]


def digits_twice():
    """The training digits, often enough for two shards."""
    samples = DIGITS.open(None, DIGITS.counts).splits["train"]
    return [samples[i % len(samples)] for i in range(SHARD + 100)]


class Run:
    """A run with the small networks, and a diary of when its events happened."""

    def __init__(self, folder, index, state: TrainState | None = None, **changes) -> None:
        settings = recipe(**{**INTERVALS, "batch_size": 10, **changes})
        self.index, self.folder = index, RunFolder(folder / "run")
        self.folder.claim(settings, "auto")
        self.state = state or TrainState(settings, index.mean_image, torch.device("cpu"))
        self.state.recipe = settings
        self.ticks, self.saves, self.shows, self.validations = [], [], [], []
        self.asked = 0

    def train(self, should_stop=lambda run: False):
        def note(diary, function):
            def noting(*args):
                diary.append(self.state.num_images)
                return function(*args)

            return noting

        def ask() -> bool:
            self.asked += 1
            return should_stop(self)

        settings, state = self.state.recipe, self.state
        stream = Stream(
            self.index, "train", seed=0, lanes=24, micro_batch=settings.micro_batch, num_images=state.num_images
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            patch = mock.patch.object
            stack.enter_context(patch(checkpoint, "save", note(self.saves, checkpoint.save)))
            stack.enter_context(patch(loop, "validate", note(self.validations, loop.validate)))
            stack.enter_context(patch(loop, "show", note(self.shows, loop.show)))
            return train(
                state,
                stream,
                self.index,
                self.folder,
                should_stop=ask,
                on_tick=lambda num_images, scalars: self.ticks.append(num_images),
            )


def test_clock_counts_crossings():
    clock = Clock(0)
    crossed = []
    for num_images in range(30, 301, 30):
        clock.advance(num_images)
        crossed += [num_images] * clock.crossed(100)
    assert crossed == [120, 210, 300]
    clock.advance(300)
    assert not clock.crossed(100)
    clock = Clock(100)
    clock.advance(130)
    assert not clock.crossed(100)
    clock.advance(430)
    assert clock.crossed(100)


def test_events_happen_at_the_right_images(tmp_path, digits):
    run = Run(tmp_path, digits, num_images=95)
    last = run.train()
    assert run.state.num_images == 100  # the first multiple of the batch at or after 95
    assert run.ticks == [30, 50, 80, 100]
    assert run.saves == [40, 80, 100]
    assert run.shows == [0, 40, 70, 100]
    assert run.validations == [50, 100]
    assert last == run.folder.saved()[-1] == run.folder.checkpoints / "000000000100"
    assert [path.name for path in run.folder.saved()] == [f"{n:012d}" for n in run.saves]
    figures = {f"{what}-{n:012d}.png" for what in ("samples", "reconstructions", "interpolations") for n in run.shows}
    assert {path.name for path in run.folder.figures.iterdir()} == figures
    with Image.open(run.folder.figures / "samples-000000000000.png") as image:
        assert image.size == (8 * 32, 8 * 32)


def test_without_save_images_the_best_interval_decides(tmp_path, digits, monkeypatch):
    asked = []

    def best_interval(save_seconds: float, seconds_between_failures: float) -> float:
        asked.append((save_seconds, seconds_between_failures))
        return [0.0, 1e9][len(asked) > 2]

    monkeypatch.setattr(checkpoint, "best_interval", best_interval)
    run = Run(tmp_path, digits, num_images=140, tick_images=20, save_images=None)
    run.train()
    assert run.ticks == [20, 40, 60, 80, 100, 120, 140]
    # At every tick while saving seems to cost nothing, then at the end: an hour makes many images
    assert run.saves == [20, 40, 140]
    assert asked[0] == (0.0, 3600 * checkpoint.HOURS_BETWEEN_FAILURES)
    assert [seconds for seconds, _ in asked[1:3]] == [
        line["seconds"] for line in read_lines(run.folder.events) if line["event"] == "save"
    ][:2]


def test_intervals_shorter_than_a_batch(tmp_path, digits):
    run = Run(tmp_path, digits, num_images=30, **dict.fromkeys(("tick_images", "save_images", "sample_images"), 3))
    run.train()
    assert run.ticks == run.saves == [10, 20, 30]
    assert run.shows == [0, 10, 20, 30]
    assert run.validations == [30]


def test_ticks_hold_training_and_validation_numbers(tmp_path, digits):
    run = Run(tmp_path, digits, num_images=60)
    run.train()
    ticks = read_ticks(run.folder.ticks)
    assert [(tick["num_images"], "loss/d" in tick, "valid/loss/d" in tick) for tick in ticks] == [
        (30, True, False),
        (50, True, False),
        (50, False, True),
        (60, True, False),
        (60, False, True),
    ]
    statistics = {f"{name}/{what}" for name in ("mu", "sigma", "z_hat", "x_tilde") for what in ("mean", "std")}
    for tick in ticks:
        prefix = "valid/" if "valid/loss/d" in tick else ""
        losses = {"loss/d", "loss/g", "accuracy/data", "accuracy/sample"}
        assert {prefix + name for name in statistics | losses} <= tick.keys()
        assert 0 < tick[f"{prefix}accuracy/data"] < 1
    speed = {"images_per_s", "images_per_s_per_worker", "data_wait_share", "update_ms"}
    expected = {f"speed/{name}" for name in speed} | {"memory/host_gib"}
    expected |= {f"grad_norm/{name}" for name in ("encoder", "decoder", "discriminator")}
    assert expected <= ticks[0].keys()
    assert all(ticks[0][name] > 0 for name in expected - {"speed/data_wait_share"})
    assert ticks[0]["speed/images_per_s"] == pytest.approx(10_000 / ticks[0]["speed/update_ms"])


@pytest.mark.parametrize("after", [1, 2])
def test_a_request_to_stop_ends_with_a_checkpoint_at_that_step(tmp_path, digits, after):
    run = Run(tmp_path, digits, num_images=10_000, tick_images=5_000, save_images=5_000)
    last = run.train(should_stop=lambda run: run.asked == after)
    assert run.state.num_images == 10 * after
    assert last == run.folder.checkpoints / f"{10 * after:012d}"
    checkpoint.verify(last)
    assert run.ticks == run.saves == [10 * after]
    assert (run.shows, run.validations) == ([0], [])


def test_a_stop_on_an_event_saves_once_and_draws_nothing(tmp_path, digits):
    run = Run(tmp_path, digits, num_images=10_000, tick_images=10**6, save_images=40, sample_images=40)
    run.train(should_stop=lambda run: run.state.num_images == 40)
    assert (run.saves, run.shows, run.ticks) == ([40], [0], [40])


def test_continuing_does_what_an_uninterrupted_run_does(tmp_path, digits):
    seldom = {"tick_images": 10**6}  # until the first tick, each update is followed by a question whether to stop
    through = Run(tmp_path / "a", digits, num_images=90, **seldom)
    through.train()
    first = Run(tmp_path / "b", digits, num_images=90, **seldom)
    first.train(should_stop=lambda run: run.state.num_images == 60)
    second = Run(tmp_path / "b", digits, state=first.state, num_images=90, **seldom)
    second.train()
    assert_same(second.state.tensors(), through.state.tensors())
    assert (first.shows, first.saves) == ([0, 40], [40, 60])
    assert (second.shows, second.saves) == ([70, 90], [80, 90])  # nothing is drawn again at the start
    assert [t["num_images"] for t in read_ticks(second.folder.ticks)] == [50, 60, 90, 90]


def test_a_finished_run_does_nothing_more(tmp_path, digits):
    run = Run(tmp_path, digits, num_images=20)
    run.train()
    again = Run(tmp_path, digits, state=run.state, num_images=20)
    again.train()
    assert (again.ticks, again.saves, again.shows) == ([], [], [])


def test_accumulation_takes_its_micro_batches_from_the_stream(tmp_path, digits):
    taken = []

    def counting(state, batches, step=fast.step):
        taken.append([(len(batch.x), batch.size) for batch in batches])
        return step(state, batches)

    run = Run(tmp_path, digits, num_images=24, batch_size=12, accumulate=3)
    with mock.patch.object(fast, "step", counting):
        run.train()
    assert taken == [[(4, 4)] * 3] * 2


def poison(run) -> bool:
    if run.state.num_images == 30:
        run.state.model.decoder[0].weight.data.fill_(float("nan"))
    return False


def test_a_bad_number_leaves_the_last_checkpoint(tmp_path, digits):
    run = Run(tmp_path, digits, num_images=1000, save_images=20, tick_images=10**6)

    with pytest.raises(NonFinite, match="grad_norm/decoder"):
        run.train(should_stop=poison)
    assert run.state.num_images == 30
    assert checkpoint.newest_whole(run.folder) == (run.folder.checkpoints / "000000000020", [])


def test_drawing_saving_and_validating_count_as_no_training_time(tmp_path, digits):
    seconds = [0.0]

    def slow(function, duration):
        def call(*args):
            seconds[0] += duration
            return function(*args)

        return call

    run = Run(tmp_path, digits, num_images=100)
    with (
        mock.patch.object(loop, "time", SimpleNamespace(perf_counter=lambda: seconds[0])),
        mock.patch.object(fast, "step", slow(fast.step, 1)),
        mock.patch.object(loop, "show", slow(loop.show, 1000)),
        mock.patch.object(loop, "validate", slow(loop.validate, 1000)),
        mock.patch.object(checkpoint, "save", slow(checkpoint.save, 1000)),
    ):
        run.train()
    speeds = [tick["speed/images_per_s"] for tick in read_ticks(run.folder.ticks) if "loss/d" in tick]
    assert speeds == [10, 10, 10, 10]


def static(index, **changes) -> TrainState:
    """A state whose updates go through fixed buffers, as on a GPU."""
    settings = recipe(**{**INTERVALS, "batch_size": 10, **changes})
    return TrainState(settings, index.mean_image, torch.device("cpu"), impl="ref", static=True)


def test_updates_through_fixed_buffers_make_the_same_run(tmp_path, digits):
    """Ticks, checkpoints and what is in them; Adam in one flat buffer rounds its own way."""
    plain = Run(tmp_path / "plain", digits, num_images=95)
    fixed = Run(tmp_path / "fixed", digits, static(digits), num_images=95)
    saved = [load_file(run.train() / "model.safetensors") for run in (plain, fixed)]
    assert (fixed.ticks, fixed.saves, fixed.shows) == (plain.ticks, plain.saves, plain.shows)
    ticks = [[tick for tick in read_ticks(run.folder.ticks) if "loss/d" in tick] for run in (plain, fixed)]
    for one, other in zip(*ticks, strict=True):
        assert one.keys() == other.keys()
        same = [name for name in one if name.startswith(("loss/", "accuracy/", "grad_norm/", "mu/", "x_tilde/"))]
        assert {name: one[name] for name in same} == pytest.approx({name: other[name] for name in same}, rel=1e-3)
    assert greatest_difference(*saved) < 1e-4


def test_a_bad_number_in_a_fixed_buffer_ends_the_run_at_the_next_pause(tmp_path, digits):
    run = Run(tmp_path, digits, static(digits), num_images=1000, save_images=20, tick_images=10**6)

    with pytest.raises(NonFinite, match="grad_norm/decoder"):
        run.train(should_stop=poison)
    assert run.state.num_images == 40 and checkpoint.newest_whole(run.folder)[0].name == "000000000020"


NUMBERS = {
    "loss/d": 1.2345,
    "loss/g": 2.5,
    "accuracy/data": 0.75,
    "accuracy/sample": 0.5,
    "speed/images_per_s": 1234.5,
    "speed/data_wait_share": 0.0123,
    "memory/host_gib": 1.26,
}


def test_damaged_shards_are_counted_in_ticks_and_on_the_status_line(tmp_path, digits):
    splits = {"train": digits_twice(), "valid": DIGITS.open(None, DIGITS.counts).splits["valid"]}
    spec = dataclasses.replace(DIGITS, counts={split: len(samples) for split, samples in splits.items()})
    with new_folder(tmp_path / "data", "digits") as folder:
        pack(spec, OpenSource(digits.classes, splits), None, folder)
    (tmp_path / "data" / "digits" / "train-000001.tar").unlink()
    run = Run(tmp_path, load_index(tmp_path / "data", "digits", skip_bad=True), num_images=100)
    run.train()
    ticks = [tick for tick in read_ticks(run.folder.ticks) if "loss/d" in tick]
    assert {tick["data/bad_shards"] for tick in ticks} == {1}
    replaced = [tick["data/replaced_images"] for tick in ticks]
    assert 0 < replaced[0] <= replaced[-1]
    line = status_line({**NUMBERS, "data/bad_shards": 1.0}, 12_345, 100_000)
    assert line.endswith("ETA 0h01m  1 BAD SHARDS") and "BAD" not in status_line(NUMBERS, 12_345, 100_000)


def test_status_line():
    assert status_line(NUMBERS, 12_345, 100_000) == (
        "    12,345 / 100,000 images   12.3 %  L_D 1.234  L_G 2.500  acc 0.75/0.50  1,234 img/s  wait 1.2 %  "
        "1.3 GiB  ETA 0h01m"
    )


@pytest.mark.parametrize(
    "left, eta", [(0, "0s"), (59, "59s"), (60, "0h01m"), (3599, "1h00m"), (7260, "2h01m"), (360_000, "100h00m")]
)
def test_time_left(left, eta):
    line = status_line({**NUMBERS, "speed/images_per_s": 1.0}, 1_000_000 - left, 1_000_000)
    assert line.endswith(f"ETA {eta}")


def test_log_goes_to_stderr_and_the_runs_file_once(tmp_path, capsys):
    for _ in range(2):
        log_to(tmp_path / "log.txt")
    logging.getLogger("ali_dist.loop").info("hello")
    log_to(None)
    logging.getLogger("ali_dist.loop").info("again")
    assert [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()] == ["hello", "again"]
    assert (tmp_path / "log.txt").read_text().endswith("  hello\n")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
