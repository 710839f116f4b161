"""Runs whose --storage is an address of s3 or gs: rank 0 trains in a folder of its host, which here is sent there."""

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ali_dist import patience
from ali_dist.finite import NonFinite
from ali_dist.patience import patiently
from ali_dist.recipe import UserError
from ali_dist.remote import REQUESTS, WRITTEN, fetch_checkpoint, is_whole, pull, saved
from ali_dist.run import RunFolder

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0  # for requests, and for a new checkpoint
SECONDS_BETWEEN_ROUNDS = 5.0  # of sending, or of fetching, what is small,
SHARE = 0.1  # and at most this share of the time is spent on it
SENDING = ".sending"  # holds the checkpoint that is being sent
OWNER = "OWNER"  # holds the id of the folder that wrote last; OWNER.id is there on the store


@contextlib.contextmanager
def followed(run: RunFolder) -> Iterator[None]:
    """Inside it, the driver's copy of a run follows the store, and STOP and REGROUP in it are sent there."""
    if not run.bucket:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(patience.SECONDS_OF_PATIENCE)


def _follow(run: RunFolder, ended: threading.Event) -> None:
    due, sent = 0.0, set()  # REGROUP may be asked again and again, STOP once
    while not ended.wait(SECONDS_BETWEEN_LOOKS):
        with contextlib.suppress(OSError):  # the workers say so
            for path in (run.stop, run.regroup):
                if path.exists() and path not in sent:
                    run.bucket.put(path.name, b"")
                    sent |= {path} - {run.regroup}
                    run.regroup.unlink(missing_ok=True)
            if time.monotonic() >= due:
                begin = time.monotonic()
                pull(run, spare=REQUESTS)
                due = _next_round(begin)


def _next_round(begin: float) -> float:
    return time.monotonic() + max(SECONDS_BETWEEN_ROUNDS, (time.monotonic() - begin) * (1 / SHARE - 1))


class Mirror:
    """While it is open, the store is sent what rank 0 writes to the run's folder, by threads that no update waits for.

    Opening it brings the folder up to date: it stays as it is where it wrote last, and is what the store has
    otherwise. Checkpoints are sent one at a time, always the newest; all but the `keep` newest are deleted there. An
    event "uploaded" says that one is there. Closing it waits until everything is, also after a UserError or NonFinite.

    UserError when the store does not answer for long at either end, or another host has taken the run over; in
    between training goes on.
    """

    def __init__(self, run: RunFolder, keep: int) -> None:
        self.run, self.bucket, self.keep = run, run.bucket, keep
        self.sent: dict[str, object] = {}  # name -> what tells whether it has changed since
        self.uploaded: bytes | None = None  # the manifest of the newest checkpoint there
        self.partly: tuple[bytes, set[str]] = (b"", set())  # the manifest of one on its way, and its files there
        self.progress = 0.0  # when some bytes last arrived
        self.ended, self.lost = threading.Event(), threading.Event()
        self.trouble: Exception | None = None
        self.since = self.told = 0.0  # when it began, and was last logged
        self.id = ""

    def __enter__(self) -> "Mirror":
        patiently(self._take_over, f"bring the run here from {self.run}")
        self.listener, self.sender = (threading.Thread(target=work, daemon=True) for work in (self._listen, self._send))
        self.listener.start()
        self.sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.set()
        if kind and not issubclass(kind, UserError | NonFinite):  # this process is to go at once
            self.lost.set()
            return
        self._arrived()
        while self.sender.is_alive() and time.monotonic() - self.progress < patience.SECONDS_OF_PATIENCE:
            self.sender.join(SECONDS_BETWEEN_LOOKS)
        lost = self.lost.is_set()
        self.lost.set()  # what could still be sent now is too late
        if kind:
            return
        if lost:
            raise UserError(f"another host goes on with {self.run}: this job's own end is in {self.run.root}")
        if self.trouble or self.sender.is_alive():
            raise UserError(
                f"the end of the run could not be sent to {self.run} ({self.trouble or 'no answer'}): it is in "
                f"{self.run.root}; bring the storage back, and start the same command again on this host"
            )

    def _take_over(self) -> None:
        """Raises OSError, and may be called again then."""
        run, kept = self.run, self.run.root / OWNER
        owners = {name for name in self.bucket.files(deep=False) if name.startswith(f"{OWNER}.")}
        self.id = kept.read_text() if kept.exists() else ""
        if f"{OWNER}.{self.id}" not in owners:
            self.id = uuid.uuid4().hex
            for path in run.root.glob("*"):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in REQUESTS:  # which this process may have been asked since it began
                    path.unlink()
            pull(run, spare=REQUESTS)
            for path in run.saved():  # of which there are only manifests
                shutil.rmtree(path)
        for held in run.root.glob(f"{SENDING}.*"):  # of a process that was killed
            shutil.rmtree(held, ignore_errors=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        self._newest_whole_checkpoint()
        self.bucket.put(f"{OWNER}.{self.id}", b"")
        for name in owners - {f"{OWNER}.{self.id}"}:
            self.bucket.delete(name)
        kept.write_text(self.id)
        self.sent = {name: size for name, (size, _) in self.bucket.files().items() if "/" in name}

    def _newest_whole_checkpoint(self) -> None:
        """Brings those down to the newest whole one, of this folder's and the store's, and leaves the rest as it is."""
        there = {number for number, whole in saved(self.run).items() if whole}
        for number in sorted(there | {int(path.name) for path in self.run.saved()}, reverse=True):
            path = self.run.checkpoints / f"{number:012d}"
            mine = path.exists() and is_whole(path)
            if mine or (number in there and is_whole(fetch_checkpoint(self.run, number))):
                manifest = (path / "manifest.json").read_bytes()
                if number in there and self.bucket.get(f"checkpoints/{path.name}/manifest.json") == manifest:
                    self.uploaded = manifest  # by this folder, or it was whole when it came
                return

    def _listen(self) -> None:
        """Brings requests here; ends the run where another host goes on with it."""
        mine = f"{OWNER}.{self.id}"
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS) and not self.lost.is_set():
            with contextlib.suppress(OSError):  # the other thread says so
                there = self.bucket.has(mine, *REQUESTS)
                if self.ended.is_set():
                    return
                if mine not in there:
                    self.lost.set()
                    log.warning(f"another host goes on with {self.run}: this one saves in {self.run.root} and ends")
                    self.run.stop.touch()
                for name in there & set(REQUESTS):
                    (self.run.root / name).touch()

    def _send(self) -> None:
        due = 0.0
        while not self.lost.is_set():
            last = self.ended.is_set()
            try:
                self._send_checkpoint()
                begin = time.monotonic()
                if last or begin >= due:
                    self._send_small()
                    due = _next_round(begin)
                self._tell(None)
            except Exception as error:  # whatever it is: else the run would end as if all were sent
                self._tell(error)
            if last and self.trouble is None:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS) if last else self.ended.wait(SECONDS_BETWEEN_LOOKS)

    def _arrived(self) -> None:
        """Some more of a checkpoint is there: while that is so, the end of the run waits for the rest."""
        self.progress = time.monotonic()

    def _tell(self, error: Exception | None) -> None:
        """Logs that sending fails, again every few minutes, and when it no longer does."""
        now = time.monotonic()
        if self.lost.is_set():
            return
        if error and not self.trouble:
            self.since = self.told = now
            log.warning(f"can't send to {self.run} ({error}): trying again, training goes on")
        elif error and now - self.told >= patience.SECONDS_OF_PATIENCE:
            self.told = now
            log.warning(f"can't send to {self.run} for {now - self.since:,.0f} s ({error}): it is in {self.run.root}")
        elif self.trouble and not error:
            log.warning(f"could send to {self.run} after {now - self.since:,.1f} s")
        self.trouble = error

    def _send_small(self) -> None:
        """What rank 0 writes besides checkpoints, each file whole when it has changed."""
        root = self.run.root
        paths = [root / name for name in WRITTEN]
        for folder in (self.run.tensorboard, self.run.figures):
            paths += [path for path in folder.glob("*") if not path.name.startswith(".")]
        for path in filter(Path.is_file, paths):
            name, about = path.relative_to(root).as_posix(), path.stat()
            mark = about.st_size if "/" in name else (about.st_size, about.st_mtime_ns)
            if self.sent.get(name) != mark:
                self.bucket.put(name, path)
                self.sent[name] = mark

    def _send_checkpoint(self) -> None:
        """Sends the newest checkpoint, unless it is there, and deletes those that are not to be kept."""
        held = self.run.root / f"{SENDING}.{uuid.uuid4().hex}"
        try:
            if manifest := self._hold(held):
                self._send_held(held, manifest)
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _hold(self, held: Path) -> bytes | None:
        """Links to the newest checkpoint's files, as it may be deleted before it is sent; its manifest if it is new.

        None for a damaged one, which is about to be set aside.
        """
        for newest in self.run.saved()[-1:]:
            with contextlib.suppress(FileNotFoundError):  # deleted since: there is a newer one
                manifest = (newest / "manifest.json").read_bytes()
                if manifest != self.uploaded:
                    (held / newest.name).mkdir(parents=True)
                    for file in newest.iterdir():
                        os.link(file, held / newest.name / file.name)
                    return manifest if is_whole(held / newest.name) else None
        return None

    def _send_held(self, held: Path, manifest: bytes) -> None:
        """All files of the checkpoint, its manifest last."""
        begin, folder = time.monotonic(), next(held.iterdir())
        name = f"checkpoints/{folder.name}"
        self.bucket.delete(f"{name}/manifest.json")  # of one that was not whole, perhaps with the same words
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
        if self.partly[0] != manifest:
            self.partly = (manifest, set())
        for file in sizes.keys() - self.partly[1]:
            self.bucket.put(f"{name}/{file}", folder / file, self._arrived)
            self.partly[1].add(file)
            self._arrived()
        there = self.bucket.files(name)
        short = [file for file, size in sizes.items() if there.get(f"{name}/{file}", (None, 0))[0] != size]
        if short:
            self.partly[1].difference_update(short)
            raise OSError(f"{', '.join(short)} did not arrive whole")
        if self.lost.is_set():
            return
        self._send_small()  # first, that no events there be older than the checkpoint
        self.bucket.put(f"{name}/manifest.json", manifest)
        self.uploaded = manifest
        self.run.record("uploaded", int(folder.name), seconds=time.monotonic() - begin)
        self._thin_out(int(folder.name))

    def _thin_out(self, newest: int) -> None:
        """Leaves the `keep` whole checkpoints up to this; newer ones were not whole, or training would be there."""
        there = saved(self.run)
        kept = [number for number, whole in there.items() if whole and number <= newest][-self.keep :]
        for number in there.keys() - set(kept):
            folder = f"checkpoints/{number:012d}"
            self.bucket.delete(f"{folder}/manifest.json")
            self.bucket.delete_folder(folder)
