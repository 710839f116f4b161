"""Runs at an address of s3 or gs: this host's copies of them, which all else takes for the run's folder.

What the driver and rank 0 say to each other by files goes through the store, as they may be on different hosts.

A checkpoint there counts when it has its manifest.json, which is sent last and deleted first.
"""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from ali_dist import checkpoint
from ali_dist.cli import cache_folder
from ali_dist.data.store import BUCKETS, open_bucket, persistently, without_password
from ali_dist.patience import patiently
from ali_dist.recipe import Recipe, UserError
from ali_dist.run import RunFolder, find_run, parse_json, write_whole

Use = Literal["work", "job", "read"]  # of a copy: rank 0 trains in it, the job's driver follows it, a command reads it

WRITTEN = ("recipe.json", "labels.json", "log.txt", "ticks.jsonl", "events.jsonl")  # small files, by rank 0 alone
REQUESTS = ("STOP", "REGROUP")
CONTROL = (*REQUESTS, "FAILED")
SMALL = (*WRITTEN, *CONTROL, "metrics.jsonl")
# All other names, as of files outside a copy, are a stranger's: never fetched
PART = re.compile(r"checkpoints/(\d{12})/[a-z]+\.(?:json|safetensors)")
MANIFEST = re.compile(r"checkpoints/(\d{12})/manifest\.json")

T = TypeVar("T")


def is_bucket(place: str | Path) -> bool:
    """Whether this is an address at which a run may lie."""
    return str(place).partition("://")[0] in BUCKETS


def run_at(storage: str, name: str, use: Use = "work") -> RunFolder:
    """The run of this name in --storage; of an address, this host's copy. UserError for other kinds of address."""
    if not is_bucket(storage):
        if re.match(r"[a-z][a-z0-9+.-]+://", storage):
            shown = without_password(storage)
            raise UserError(f"--storage {shown}: give a folder, or an address that begins with s3:// or gs://")
        return RunFolder(Path(storage) / name)
    bucket = open_bucket(storage, name)
    parts = urlsplit(str(bucket))
    words = [parts.netloc, *parts.path.strip("/").split("/")]
    if not all(word.strip(".") for word in words):
        raise UserError(f"{bucket}: no part of a run's address may be empty or of dots")
    return RunFolder(cache_folder().joinpath("runs", use, parts.scheme, *words), bucket)


def copy_of(run: RunFolder, use: Use) -> RunFolder:
    """This host's copy of the run for another use; a local run itself."""
    return run_at(run.bucket.address, "", use) if run.bucket else run


def pull(run: RunFolder, spare: Collection[str] = ()) -> None:
    """Brings what is small up to date: SMALL and the checkpoints' manifests; `spare` are names that are not deleted.

    A local run is as it is. OSError when the store does not answer.
    """
    if not run.bucket:
        return
    there = run.bucket.files(deep=False) | run.bucket.files("checkpoints")
    wanted = {name: about for name, about in there.items() if name in SMALL or MANIFEST.fullmatch(name)}
    for name, (size, mtime) in wanted.items():
        path = run.root / name
        if not path.exists() or (path.stat().st_size, path.stat().st_mtime_ns) != (size, mtime):
            _bring(run, name, mtime)
    for path in [*(run.root / name for name in SMALL), *run.checkpoints.glob("*/manifest.json")]:
        name = path.relative_to(run.root).as_posix()
        if name in wanted or name in spare:
            continue
        path.unlink(missing_ok=True)
        if MANIFEST.fullmatch(name):
            shutil.rmtree(path.parent, ignore_errors=True)


def _bring(run: RunFolder, name: str, mtime: int) -> None:
    """One file whole, if it is there, with the store's own time of change in ns."""
    path = run.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        run.bucket.fetch(name, partial)
        os.utime(partial, ns=(mtime, mtime))
        os.replace(partial, path)
    except FileNotFoundError:  # since it was listed
        pass
    finally:
        partial.unlink(missing_ok=True)


def saved(run: RunFolder) -> dict[int, bool]:
    """Images of each checkpoint of which anything is there, in order -> whether it has its manifest."""
    names = run.bucket.files("checkpoints")
    numbers = sorted({int(found[1]) for name in names if (found := PART.fullmatch(name))})
    return {number: f"checkpoints/{number:012d}/manifest.json" in names for number in numbers}


def fetch_checkpoint(run: RunFolder, number: int) -> Path:
    """Brings all files of a checkpoint here as they are, which is to be verified."""
    final = run.checkpoints / f"{number:012d}"
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        for name in filter(PART.fullmatch, run.bucket.files(f"checkpoints/{final.name}")):
            run.bucket.fetch(name, partial / PurePosixPath(name).name)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except checkpoint.Damaged:
        return False
    return True


def find(words: str, storage: str) -> RunFolder:
    """The run that a command line names: as `run.find_run`, or at an address, of which the small files are fetched."""
    if is_bucket(words):
        run, _ = _named(words)
    else:
        run = run_at(storage, words, "read")
    if not run.bucket:
        return find_run(words, storage)
    reach(f"read {run}", lambda: pull(run))
    if not run.recipe.exists():
        raise UserError(f"no run at {run}: it has no recipe.json; give its address, or --storage")
    return run


def _named(address: str) -> tuple[RunFolder, int | None]:
    """A command's copy of the run, and the checkpoint's number where the address is of one."""
    parts = urlsplit(address)
    found = re.fullmatch(r"(.+)/checkpoints/(\d{12})", parts.path.rstrip("/"))
    run = run_at(parts._replace(path=found[1] if found else parts.path.rstrip("/")).geturl(), "", "read")
    return run, int(found[2]) if found else None


def checkpoint_at(address: str) -> tuple[RunFolder, Path]:
    """This host's copies of a run and of its checkpoint that the address is of, or of its newest one; unverified.

    UserError when there is none.
    """
    run, number = _named(address)
    reach(f"read {run}", lambda: pull(run))
    path = run.checkpoints / f"{number:012d}" if number is not None else next(iter(run.saved()[::-1]), None)
    if path is None or not (path / "manifest.json").exists():
        raise UserError(f"no checkpoint at {without_password(address)}: give a run's address or one of its checkpoints")
    with open(run.root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # not while another process of this host fetches it
        if not is_whole(path):
            reach(f"read {run.shown(path)}", lambda: fetch_checkpoint(run, int(path.name)))
    return run, path


def verify(run: RunFolder, path: Path) -> None:
    """As `checkpoint.verify`; of a run at an address only whether its files are as long as they should be there."""
    if not run.bucket:
        return checkpoint.verify(path)
    try:
        manifest: dict[str, Any] = parse_json((path / "manifest.json").read_text())
        files = run.bucket.files(f"checkpoints/{path.name}")
        for name, expected in manifest.items():
            size, _ = files.get(f"checkpoints/{path.name}/{name}", (None, 0))
            if size != expected["bytes"]:
                raise checkpoint.Damaged(f"{run.shown(path)}/{name} has {size} bytes, not {expected['bytes']}")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise checkpoint.Damaged(f"checkpoint {run.shown(path)} is damaged: {error}") from error


def start(run: RunFolder, recipe: Recipe, resume: str) -> str:
    """Makes the run this recipe's, as `RunFolder.claim`, and forgets what was asked of it before.

    Returns the id of the job that begins by this.
    """
    copy = copy_of(run, "job")
    if run.bucket:
        reach(f"read --storage {run}", lambda: pull(copy))
    copy.claim(recipe, resume)
    for place in (copy, run):
        for name in CONTROL:
            (place.root / name).unlink(missing_ok=True)
    if run.bucket:
        reach(f"write to --storage {run}", lambda: _begin(copy))
    return copy.take_over()


def _begin(copy: RunFolder) -> None:
    copy.bucket.put(copy.recipe.name, copy.recipe)
    for name in copy.bucket.has(*CONTROL):
        copy.bucket.delete(name)


def heed(run: RunFolder) -> None:
    """For rank 0 that starts: REGROUP has been heeded, and at an address STOP and FAILED are as they are there."""
    run.regroup.unlink(missing_ok=True)
    if run.bucket:
        run.root.mkdir(parents=True, exist_ok=True)
        there = patiently(lambda: _heed(run), f"reach {run}")
        for name in CONTROL:
            (run.root / name).unlink(missing_ok=True)
        for name in there:
            (run.root / name).touch()


def _heed(run: RunFolder) -> set[str]:
    run.bucket.delete(run.regroup.name)
    return run.bucket.has(run.stop.name, run.failed.name)


@contextmanager
def changing(run: RunFolder, path: Path) -> Iterator[None]:
    """Inside it, a file of the run may be written that the trainer does not write.

    At an address the newest one is fetched before and sent after. UserError when the store does not answer.
    """
    remote = run.bucket and path.is_relative_to(run.root)
    if remote:
        reach(f"read {run}", lambda: pull(run))
        path.parent.mkdir(parents=True, exist_ok=True)
    yield
    if remote:
        name = path.relative_to(run.root).as_posix()
        reach(f"write {run.shown(path)}", lambda: run.bucket.put(name, path))


def reach(what: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again a few times; UserError "cannot {what}" when the store does not answer."""
    try:
        return persistently(what, action)
    except OSError as error:
        raise UserError(f"cannot {what} ({error}): check the address and your credentials") from error


def fail(run: RunFolder, why: str) -> None:
    """Says for good why the run ended; as far as that can be written."""
    with suppress(OSError):
        write_whole(run.failed, why)
    with suppress(OSError, UserError):
        if run.bucket:
            run.bucket.put(run.failed.name, why.encode())
