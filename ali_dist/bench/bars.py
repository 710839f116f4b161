"""What the stream must reach, held against what was measured."""

from typing import Any

JPEG = ("webdataset", "webdataset-rgb8")
LIMIT = ("memmap", "memmap-random")
Tree = dict[str, Any]


def best(peers: Tree, name: str, key: str) -> float | None:
    """The better median over the numbers of workers, warm, after the first epoch."""
    ways = peers.get(name, {}).get("workers", {}).values()
    return max((way["steady"][key]["median"] for way in ways), default=None)


def bars(peers: Tree, disk_bytes: float, raw_bytes: int) -> list[Tree]:
    """A row each: name, bar, measured (None when its peers were not), and whether it is met."""
    ours, rows = peers["ours"]["workers"]["0"], []

    def row(name: str, bar: float, measured: float | None, at_most: bool = False, unit: str = "") -> None:
        met = measured is not None and (measured <= bar if at_most else measured >= bar)
        rows.append({"name": name, "bar": bar, "at_most": at_most, "unit": unit, "measured": measured, "met": met})

    def ratio(key: str, names: tuple[str, ...]) -> tuple[float | None, str]:
        """Ours to the best of these, and that one's name."""
        found = {name: value for name in names if (value := best(peers, name, key)) is not None}
        if not found:
            return None, "none measured"
        first = max(found, key=found.get)
        return ours["steady"][key]["median"] / found[first], first

    measured, name = ratio("per_core", JPEG)
    row(f"images/s per core, of plain JPEG webdataset ({name})", 8, measured, unit="x")
    others = tuple(name for name in peers if name not in LIMIT and not name.startswith("ours"))
    for key, text in (("per_core", "images/s per core"), ("images_per_s", "images/s")):
        measured, name = ratio(key, others)
        row(f"{text}, of the best peer ({name})", 1, measured, unit="x")
    measured, _ = ratio("per_core", LIMIT[1:])
    measured = None if measured is None else 100 * measured
    row("images/s per core, of the memory-mapped random gather", 8, measured, unit="%")
    row("the same, stretch", 25, measured, unit="%")
    row("images/s of one process", 60_000, ours["steady"]["images_per_s"]["median"])
    row("start to first batch, s", 0.3, ours["first_batch_s"]["median"], at_most=True)
    row("memory beyond a process with PyTorch, MB", 300, ours["memory"]["high"] / 1e6, at_most=True)
    row("shards' bytes, of the raw bytes", 1.1, disk_bytes / raw_bytes, at_most=True)
    return rows
