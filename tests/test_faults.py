"""Faults injected for real into training without Ray: numbers, disks, storage, kills inside a save."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import recipe, when_reaching

from ali_dist import checkpoint, fast, patience, worker
from ali_dist import state as state_module
from ali_dist.data.stream import Stream
from ali_dist.finite import Finite, NonFinite
from ali_dist.meter import read_ticks
from ali_dist.recipe import Job, UserError
from ali_dist.remote import fail
from ali_dist.run import RunFolder, append_line, count_restarts, read_lines
from ali_dist.state import TrainState
from ali_dist.status import as_text, status
from ali_dist.step import step

SHORT = recipe(
    num_images=64, tick_images=8, save_images=16, sample_images=10**6, validate_images=10**6, validate_count=8, keep=9
)
CPU = torch.device("cpu")

# TensorBoard's own thread ends where it can't write
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def train(data, storage, **job) -> RunFolder:
    job = Job(data=str(data), storage=str(storage), name="run", **job)
    worker.train_rank(SHORT, job, gpu=False)
    return RunFolder(storage / "run")


def weights(run: RunFolder) -> dict[str, bytes]:
    """Name of each checkpoint's file -> its bytes; the time-dependent ones left out, as there are none."""
    return {str(path.relative_to(run.root)): path.read_bytes() for path in run.checkpoints.glob("[0-9]*/*")}


def losses(run: RunFolder) -> list[tuple]:
    return [(t["num_images"], t.get("loss/d"), t.get("loss/g")) for t in read_ticks(run.ticks)]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> RunFolder:
    return train(data, tmp_path_factory.mktemp("undisturbed"))


def assert_as_undisturbed(run: RunFolder, undisturbed: RunFolder) -> None:
    assert weights(run) == weights(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert not list(run.checkpoints.glob(".*"))


def poison(monkeypatch, when) -> None:
    """Updates that begin at images for which `when` is true have a gradient that is NaN."""
    original = fast.step

    def poisoned(state, batches):
        handle = state.model.decoder[0].weight.register_hook(lambda g: g * math.nan if when(state.num_images) else g)
        try:
            return original(state, batches)
        finally:
            handle.remove()

    monkeypatch.setattr(fast, "step", poisoned)


def test_finite_names_the_first_bad_update_and_forgets_the_good_ones():
    finite, good, bad = Finite(at_once=False), torch.tensor(1.0), torch.tensor(math.inf)
    finite.check([])
    for update in range(3):
        finite.note({"a": good, "b": good})
        if update == 1:
            finite.check([0, 8])
    finite.note({"a": good, "b": bad})
    finite.note({"a": bad, "b": bad})
    with pytest.raises(NonFinite, match="^b not finite in the update after 1,024 images$") as error:
        finite.check([16, 1024, 1032])
    assert (error.value.names, error.value.num_images) == (["b"], 1024)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_nan_stops_the_run_with_its_last_good_checkpoint(data, tmp_path, monkeypatch, undisturbed, at_once):
    """Also where, as on a GPU, the verdict is read only before something is shown or saved."""
    monkeypatch.setattr(state_module, "Finite", lambda **_: Finite(at_once))
    poison(monkeypatch, lambda num_images: num_images >= 40)
    with pytest.raises(NonFinite, match="grad_norm/decoder.* not finite in the update after 40 images"):
        train(data, tmp_path)
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.saved()] == ["000000000016", "000000000032"]
    assert weights(run).items() <= weights(undisturbed).items()
    assert losses(run) == losses(undisturbed)[:5]  # the last tick is at 40 images
    found = status(run, time.time())
    assert found["state"] == "failed" and "grad_norm/decoder" in found["why"]


@pytest.mark.parametrize("at_once", [True, False])
def test_rollback_goes_on_without_the_batch(data, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(state_module, "Finite", lambda **_: Finite(at_once))
    with monkeypatch.context() as patch:
        poison(patch, lambda num_images: num_images == 40)
        run = train(data, tmp_path, on_nonfinite="rollback")
    events = read_lines(run.events)
    (back,) = [line for line in events if line["event"] == "rollback"]
    assert (back["num_images"], back["skipped"]) == (32, 40) and "grad_norm/decoder" in back["why"]
    assert count_restarts(events) == 0
    ticks = {tick["num_images"]: tick for tick in read_ticks(run.ticks) if "valid/loss/d" not in tick}
    assert list(ticks) == list(range(8, 65, 8))
    assert "loss/d" not in ticks[48] and "loss/d" in ticks[56]  # a tick of one batch, which was skipped
    assert "data/skipped_batches" not in ticks[40] and ticks[48]["data/skipped_batches"] == 1
    assert "1 SKIPPED BATCHES" in run.log.read_text()
    found = status(run, time.time())
    assert (found["state"], found["skipped_batches"]) == ("finished", 1) and "1 batches skipped" in as_text(found)

    # A run that knows from the start what to leave out is the same, and so is one that starts again before it
    shutil.copytree(run.root, tmp_path / "again" / "run")
    again = RunFolder(tmp_path / "again" / "run")
    for path in again.saved()[2:]:
        shutil.rmtree(path)
    assert weights(train(data, tmp_path / "again")) == weights(run)
    (tmp_path / "knowing" / "run").mkdir(parents=True)
    append_line(tmp_path / "knowing" / "run" / "events.jsonl", back)
    assert weights(train(data, tmp_path / "knowing")) == weights(run)


def test_rollbacks_are_bounded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MOST_ROLLBACKS", 3)
    poison(monkeypatch, lambda num_images: num_images >= 24)
    with pytest.raises(UserError, match="in the update after 48 images, after 3 rollbacks: try a smaller --lr"):
        train(data, tmp_path, on_nonfinite="rollback")
    run = RunFolder(tmp_path / "run")
    skipped = [line["skipped"] for line in read_lines(run.events) if line["event"] == "rollback"]
    assert skipped == [24, 32, 40] and "after 3 rollbacks" in run.failed.read_text()


def test_a_nan_before_the_first_checkpoint_starts_anew(data, tmp_path, monkeypatch):
    poison(monkeypatch, lambda num_images: num_images == 0)
    run = train(data, tmp_path, on_nonfinite="rollback")
    (back,) = [line for line in read_lines(run.events) if line["event"] == "rollback"]
    assert (back["num_images"], back["skipped"]) == (0, 0)
    assert int(run.saved()[-1].name) == 64


def roll_back_on_one_rank(rank: int, data: Path, storage: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, lambda num_images: num_images == 40 and rank == 1)
        train(data, storage, on_nonfinite="rollback", num_workers=2)
    return rank


def test_all_ranks_roll_back_together(ranks, data, tmp_path):
    ranks.run(2, roll_back_on_one_rank, data, tmp_path)
    run = RunFolder(tmp_path / "run")
    assert [line["skipped"] for line in read_lines(run.events) if line["event"] == "rollback"] == [40]
    assert int(run.saved()[-1].name) == 64
    checkpoint.verify(run.saved()[-1])


@contextmanager
def limited_files(_: Path):
    """Writes beyond 16 KiB of a file fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def full_disk(folder: Path):
    """Nothing more can be written to the folder's file system, which is to be a small one."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    yield filler.unlink
    filler.unlink(missing_ok=True)


@pytest.fixture(params=[limited_files, full_disk])
def trouble(request, tmp_path):
    """A folder, and what makes writing to it fail until it is told to end."""
    if request.param is limited_files:
        yield tmp_path, limited_files
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("a file system of its own can't be mounted here")
    yield folder, full_disk
    subprocess.run(["umount", "--lazy", folder], check=True)  # the log is still open


def test_a_disk_that_is_full_for_a_while(data, monkeypatch, undisturbed, trouble):
    folder, begin = trouble
    stack, timers = [], []

    def fill():
        context = begin(folder)
        end = context.__enter__()
        stack.append(context)
        timers.append(threading.Timer(0.8, end))
        timers[-1].start()

    when_reaching(monkeypatch, 40, fill)
    run = train(data, folder)
    for timer in timers:
        timer.join()
    for context in stack:
        context.__exit__(None, None, None)
    assert timers
    log = run.log.read_text()
    assert "trying again for 300 s" in log and "could " in log
    assert_as_undisturbed(run, undisturbed)


def test_a_disk_that_is_full_when_workers_start_again(data, monkeypatch, undisturbed, trouble):
    folder, begin = trouble

    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        when_reaching(patch, 40, killed)
        train(data, folder)
    with begin(folder) as end:
        timer = threading.Timer(1.2, end)
        timer.start()
        run = train(data, folder)
        timer.join()
    assert not run.failed.exists() and "could " in run.log.read_text()
    assert_as_undisturbed(run, undisturbed)


def test_why_a_run_ended_is_told_whole_or_not_at_all(trouble):
    folder, begin = trouble
    run = RunFolder(folder)
    with begin(folder):
        fail(run, "x" * 20_000)
        assert not list(folder.glob("*FAILED*"))
    fail(run, "x" * 20_000)
    assert run.failed.read_text() == "x" * 20_000


def test_a_disk_that_stays_full_ends_the_run_with_its_checkpoints(data, monkeypatch, undisturbed, trouble):
    folder, begin = trouble
    monkeypatch.setattr(patience, "SECONDS_OF_PATIENCE", 0.5)
    stack = []
    when_reaching(monkeypatch, 40, lambda: stack.append(begin(folder)) or stack[0].__enter__())
    try:
        with pytest.raises(UserError, match="can't .* make room or bring the storage back, and start the same command"):
            train(data, folder)
    finally:
        stack[0].__exit__(None, None, None)
    run = RunFolder(folder / "run")
    assert [path.name for path in run.saved()] == ["000000000016", "000000000032"]
    assert not list(run.checkpoints.glob(".*"))
    monkeypatch.undo()
    assert_as_undisturbed(train(data, folder), undisturbed)


def test_a_storage_that_is_out_of_reach_for_a_while(data, tmp_path, monkeypatch, undisturbed):
    run, away = RunFolder(tmp_path / "run"), tmp_path / "away"
    timers, made = [], []

    def back():
        made.append(run.root.exists())
        os.rename(away, run.root)

    def take():
        os.rename(run.root, away)
        timers.append(threading.Timer(1.2, back))
        timers[-1].start()

    when_reaching(monkeypatch, 40, take)
    train(data, tmp_path)
    timers[0].join()
    assert made == [False]  # nothing was begun anew in its place
    assert_as_undisturbed(run, undisturbed)


def test_a_checkpoint_that_cannot_be_read_for_a_while_is_not_set_aside(data, tmp_path, monkeypatch, undisturbed):
    shutil.copytree(undisturbed.root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    shutil.rmtree(run.saved()[-1])
    troubles = [errno.ESTALE, errno.EACCES]
    original = checkpoint.parse_json

    def stale(text):
        if troubles:
            raise OSError(troubles.pop(), "trouble")
        return original(text)

    monkeypatch.setattr(checkpoint, "parse_json", stale)
    train(data, tmp_path)
    assert not troubles and "continuing at 48 images" in run.log.read_text()
    assert_as_undisturbed(run, undisturbed)


def test_a_damaged_checkpoint_is_an_event(data, tmp_path, undisturbed):
    shutil.copytree(undisturbed.root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    os.truncate(run.saved()[-1] / "adam.safetensors", 1000)
    train(data, tmp_path)
    (event,) = [line for line in read_lines(run.events) if line["event"] == "damaged"]
    assert event["num_images"] == 48 and "000000000064 is damaged: adam.safetensors has 1000 bytes" in event["why"]
    assert (run.checkpoints / "000000000064.damaged").is_dir()
    shutil.rmtree(run.checkpoints / "000000000064.damaged")
    assert_as_undisturbed(run, undisturbed)


CALLS = [(checkpoint, "save_file"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "rmdir")]
CALLS += [(os, "unlink")]


def killed_at(call: int, run: RunFolder, state: TrainState) -> bool:
    """Saves in a process that kills itself before the given call of CALLS; False when there were fewer."""
    child = os.fork()
    if not child:
        count = 0

        def counting(function):
            def counted(*args, **named):
                nonlocal count
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return function(*args, **named)

            return counted

        try:
            for module, name in CALLS:
                setattr(module, name, counting(getattr(module, name)))
            checkpoint.save(run, state)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_kill_at_any_moment_of_a_save_loses_nothing(digits, tmp_path):
    run = RunFolder(tmp_path)
    settings = recipe(keep=2)
    state = TrainState(settings, digits.mean_image, CPU)
    with Stream(digits, "train", seed=0, lanes=24, micro_batch=8, num_images=0) as stream:
        for _ in range(3):
            step(state, [next(stream)])
            checkpoint.save(run, state)
        step(state, [next(stream)])
    outcomes = []
    for call in range(100):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(run.checkpoints, tmp_path / "copy" / "checkpoints")
        copy = RunFolder(tmp_path / "copy")
        killed = killed_at(call, copy, state)
        path, complaints = checkpoint.newest_whole(copy)
        assert complaints == [] and not list(copy.checkpoints.glob(".*"))
        for saved in copy.saved():
            checkpoint.verify(saved)
        outcomes.append([int(saved.name) for saved in copy.saved()])
        if not killed:
            break
    assert outcomes[0] == [16, 24] and outcomes[-1] == [24, 32] and [16, 24, 32] in outcomes
    assert len(outcomes) > 15
    assert sorted(map(max, outcomes)) == list(map(max, outcomes))  # once there, it stays


def test_an_appended_line_is_whole_or_not_there(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"num_images": 1, "time": 1})
    with limited_files(tmp_path), pytest.raises(OSError):
        append_line(path, {"num_images": 2, "time": 2, "long": "x" * 20_000})
    assert path.read_text().count("\n") == 1
    with open(path, "a") as file:
        file.write('{"num_images": 3, "ti')  # of a process killed while writing
    append_line(path, {"num_images": 4, "time": 4})
    assert [line["num_images"] for line in read_lines(path)] == [1, 4]
    json.loads(path.read_text().splitlines()[-1])
