"""What a source is: by its content, for the record, and by its files' sizes and times, to know it again."""

import hashlib
import threading
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def fingerprint(source: Path, stop: threading.Event | None = None) -> dict[str, Any] | None:
    """Name, bytes and SHA-256 of an archive; of a folder, over its files' relative names and contents, sorted.

    Nothing when `stop` is set meanwhile.
    """
    digest, total = hashlib.sha256(), 0
    is_folder = source.is_dir()
    for path in _files(source) if is_folder else [source]:
        size = path.stat().st_size
        if is_folder:
            digest.update(f"{path.relative_to(source).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
                if stop and stop.is_set():
                    return None
        total += size
    return {"name": source.name, "bytes": total, "sha256": digest.hexdigest()}


def mark(source: Path) -> str:
    """A checksum over the source's names, sizes and times of change: quick, where the content takes long to read."""
    digest = hashlib.sha256(str(source.resolve()).encode("utf-8", "surrogateescape"))
    for path in _files(source) if source.is_dir() else [source]:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
