"""Fetching official archives over http and https: gone on with after a cut, and held against published checksums."""

import fcntl
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from ali_dist.data.store import without_password
from ali_dist.recipe import UserError

CHUNK = 1 << 20
SECONDS = 30.0  # without a byte, until a connection counts as dead
ATTEMPTS = 5  # in a row that bring nothing
FIRST_PAUSE = 1.0  # seconds, doubled after each attempt that brings nothing
TRY_LATER = {408, 425, 429, 500, 502, 503, 504}

HINT = "try again later, give another address with --mirror, or fetch it by hand and give it with --source"

Report = Callable[[int, int], None]
"""Called with the bytes there are so far, and in all or 0 where that is unknown."""


class _Failed(Exception):
    """One address does not give the file; the text says why."""


class _Cut(Exception):
    """The connection ended early; trying again may help."""


def fetch(
    urls: Sequence[str],
    target: Path,
    md5: str | None,
    report: Report = lambda done, total: None,
    pause: float = FIRST_PAUSE,
    hint: str = HINT,
) -> None:
    """Makes the file `target` from the first of the `urls` that gives it.

    A file that is there already is kept when its MD5 is right, or when none is known; what an earlier call left half
    done is gone on with. UserError when no address gives the file with this MD5; its `hint` says what to do.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and md5 in (None, _md5(target)):
        return
    part, reasons = target.with_name(f"{target.name}.part"), []
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{part} is being fetched by another process: wait for it") from None
        for url in urls:
            try:
                _Transfer(url, file, md5, report, pause).run()
                os.replace(part, target)
                _state(part).unlink(missing_ok=True)
                return
            except _Failed as error:
                reasons.append(f"{shown(url)} {error}")
    raise UserError(f"cannot fetch {target.name}: {'; '.join(reasons)}: {hint}")


def shown(url: str) -> str:
    """The address for people's eyes: what may be a secret is left out, with a mark where a query was."""
    return without_password(url) + ("?…" if urlsplit(url).query else "")


class _Transfer:
    """One file from one address, appended to what `file`, NAME.part, holds already."""

    def __init__(self, url: str, file: BinaryIO, md5: str | None, report: Report, pause: float) -> None:
        self.url, self.file, self.md5, self.report, self.pause = url, file, md5, report, pause
        self.part, self.resumed = Path(file.name), False

    def run(self) -> None:
        """_Failed when the address does not give the file, or not with its MD5."""
        idle = wrong = 0
        while True:
            before = self._size()
            try:
                has_length = self._receive()
            except _Cut as cut:
                # A server may promise more than there is: what matters is the content
                if self.md5 and self._size() and idle == 0 and _md5(self.part) == self.md5:
                    break
                idle = 0 if self._size() > before else idle + 1
                if idle == ATTEMPTS:
                    raise _Failed(f"{cut}, {ATTEMPTS} times in a row") from cut
                time.sleep(self.pause * 2**idle)
                continue
            found = self.md5 and _md5(self.part)
            if found == self.md5:
                break
            wrong += 1
            if wrong > 2 or (has_length and not self.resumed):
                self._restart()
                raise _Failed(f"gives wrong bytes: their MD5 is {found} instead of {self.md5}")
            if has_length or self.resumed:
                self._restart()  # pieces of two versions, perhaps; else it may only have been cut unnoticed
            self.resumed = False
        self.file.flush()
        os.fsync(self.file.fileno())

    def _receive(self) -> bool:
        """Takes what one connection gives, to the end of the file; whether the server said where that is."""
        start, validator = self._size(), self._validator()
        headers = {"User-Agent": "ali_dist", "Accept-Encoding": "identity"}
        if start and validator is None and not self.md5:
            self._restart()  # nothing would tell that the file has changed
            start = 0
        if start:
            headers |= {"Range": f"bytes={start}-", **({"If-Range": validator} if validator else {})}
        try:
            with _opener().open(urllib.request.Request(self.url, headers=headers), timeout=SECONDS) as response:
                total = self._begin(response, start)
                while total is None or self._size() < total:
                    data = response.read1(CHUNK)  # what has come, so that a cut loses nothing of it
                    if not data:
                        break
                    self.file.write(data)
                    self.file.flush()
                    self.report(self._size(), total or 0)
        except urllib.error.HTTPError as error:
            self._refused(error, start)
            return True
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise _Cut(f"breaks off ({getattr(error, 'reason', error) or type(error).__name__})") from error
        if total is not None and self._size() < total:
            raise _Cut(f"ends after {self._size():,} of {total:,} bytes")
        return total is not None

    def _begin(self, response: http.client.HTTPResponse, start: int) -> int | None:
        """Makes the file ready for the answer's bytes; the whole file's size where the server tells it."""
        if response.status == 206:
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if not place or int(place[1]) != start:
                self._restart()
                raise _Cut("answers with another part of the file than was asked for")
            self.resumed = True
            return None if place[2] == "*" else int(place[2])
        self._restart()
        etag, changed = response.headers.get("ETag"), response.headers.get("Last-Modified")
        validator = etag if etag and not etag.startswith("W/") else changed
        _state(self.part).write_text(json.dumps({"url": self._mark(), "validator": validator}))
        length = response.headers.get("Content-Length")
        return int(length) if length and length.isdigit() else None

    def _refused(self, error: urllib.error.HTTPError, start: int) -> None:
        if error.code == 416:  # nothing lies beyond what is there already
            if start and error.headers.get("Content-Range", "").strip() == f"bytes */{start}":
                self.resumed = True
                return
            self._restart()
            raise _Cut("has fewer bytes than it had before")
        if error.code in TRY_LATER:
            raise _Cut(f"answers {error.code} {error.reason}")
        raise _Failed(f"answers {error.code} {error.reason}")

    def _mark(self) -> str:
        """Tells the address from others, and nobody the password or key that may be in it."""
        return hashlib.sha256(self.url.encode()).hexdigest()

    def _validator(self) -> str | None:
        """What identifies the version that is there in part; it is dropped when it came from another address."""
        try:
            state = json.loads(_state(self.part).read_text())
            if state["url"] == self._mark():
                return state["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def _restart(self) -> None:
        self.file.truncate(0)
        _state(self.part).unlink(missing_ok=True)


def _opener() -> urllib.request.OpenerDirector:
    """Knows http and https alone, also after a redirection."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
