"""CPU time and memory of processes, and the page cache, from Linux itself."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TICKS = os.sysconf("SC_CLK_TCK")  # a second
PROBED = 200  # files whose pages are looked up


def cpu_seconds() -> float:
    """Used so far by this process, its children that live, theirs, and those they have waited for."""
    times, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name in brackets: state, parent, ...; fields 14-17 are the times
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        times[int(folder.name)], parents[int(folder.name)] = sum(map(int, fields[11:15])), int(fields[1])
    family, total = {os.getpid()}, 0
    while family:
        total += sum(times.get(pid, 0) for pid in family)
        family = {pid for pid, parent in parents.items() if parent in family}
    return total / TICKS


def busy_seconds() -> float:
    """CPU time of all that ran on this machine so far, and what a hypervisor withheld."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def reset_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def files_below(folder: Path) -> list[Path]:
    return [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names]


def warm(files: Iterable[Path]) -> None:
    """Reads all of them into the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(2**20):
                pass


def drop(files: Iterable[Path]) -> None:
    """Asks the kernel to forget the files' pages, once they are on the disk; directories and inodes it keeps."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(files: list[Path]) -> float:
    """Share of the pages of the files, or of some of them, that are in the page cache; 1 when the kernel won't tell."""
    libc, pages, cached = ctypes.CDLL(None, use_errno=True), 0, 0
    files = [path for path in files if path.stat().st_size]
    for path in files[:: max(1, len(files) // PROBED)]:
        view = np.memmap(path, mode="r")
        found = np.zeros(-(-view.size // mmap.PAGESIZE), np.uint8)
        start, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
        if libc.mincore(start, size, ctypes.c_void_p(found.ctypes.data)):
            return 1.0
        pages, cached = pages + found.size, cached + int((found & 1).sum())
    return cached / max(pages, 1)
