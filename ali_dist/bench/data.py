"""`python -m ali_dist.bench data`: how fast images are read, beside other readers and the limit, in one run."""

import itertools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ali_dist import cli
from ali_dist.bench import inputs
from ali_dist.bench.about import about
from ali_dist.bench.bars import LIMIT, bars
from ali_dist.bench.children import Failed, environment, run
from ali_dist.bench.peers import BATCH, PEERS, Memmap
from ali_dist.bench.processes import cached_share, drop, files_below, warm
from ali_dist.bench.reader import contents
from ali_dist.data.index import Index, load_index
from ali_dist.data.table import DATASETS
from ali_dist.recipe import UserError

CONVERT, CHECK, MEASURE = 3600.0, 1200.0, 300.0  # seconds that a task may take, a measurement besides its own
STILL_CACHED = 0.01  # share of pages
TICK = 0.01  # seconds, CPU time's unit
Tree = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Reading real images, each reader in fresh processes of its own, in turn, page cache warm and cold."""

    dataset: str = "tinyimagenet"
    """Prepared data set, of classes."""
    data: str = ""
    """Folder of prepared data sets."""
    source: str = ""
    """The data set's official archive or folder, for the readers of JPEG files; without it they are left out."""
    peers: str = ""
    """Comma-separated readers besides ours and the memory-mapped limit; default: all."""
    images: int = 0
    """Take only the first shards that hold so many images; default: all."""
    seconds: float = 3.0
    """How long to time each."""
    rounds: int = 3
    """How often with a warm page cache, where medians count; with a cold one each is timed once."""
    cache: str = "~/.cache/ali_dist-bench"
    """Folder for the readers' environments, which are kept (3 GB)."""
    work: str = ""
    """Folder for the other formats of the data set, to be kept for the next run; default: a temporary one."""
    install: bool = True
    """Make missing environments with pip."""
    json: bool = False
    """Print JSON alone."""

    def run(self) -> None:
        names, data = self.checked(), cli.data_folder(self.data)
        if not isinstance(data, Path):
            raise UserError(f"--data {data}: the readers are compared on a local folder")
        index = load_index(data, self.dataset)
        if index.attributes:
            raise UserError(f"{self.dataset} has attributes: take a data set with classes")
        say = (lambda text: None) if self.json else (lambda text: print(text, flush=True))
        result = about(torch.device("cpu")) | {"cores": os.cpu_count(), "load": [os.getloadavg()]}
        with work_folder(self.work, inputs.work_name(index, self.images)) as work:
            result |= self.measured(index, data, names, work, say)
        result["load"].append(os.getloadavg())
        for line in lines(result):
            say(line)
        if self.json:
            print(json.dumps(result, indent=1))

    def checked(self) -> list[str]:
        """The readers' names. UserError for what makes no sense."""
        if self.dataset not in DATASETS:
            raise cli.did_you_mean("data set", self.dataset, DATASETS)
        if self.images < 0 or self.seconds <= 0 or self.rounds < 1:
            raise UserError("--images must not be negative, --seconds be positive, and --rounds at least 1")
        if self.source and not Path(self.source).expanduser().exists():
            raise UserError(f"--source {self.source} does not exist")
        wanted = [name for name in self.peers.split(",") if name] or list(PEERS)
        for name in wanted:
            if name not in PEERS:
                raise cli.did_you_mean("peer", name, PEERS)
        return [name for name in PEERS if name in {*wanted, "ours", *LIMIT}]

    def measured(self, index: Index, data: Path, names: list[str], work: Path, say: Say) -> Tree:
        shards = inputs.shards(index, data, self.images, work)
        say("writing the images as one array" + (" and as files" if self.source else ""))
        sources = {"shards": shards, "pixels": inputs.pixels(shards, work)}
        count = load_index(shards.parent, index.name).images("train")
        if self.source:
            sources["files"] = inputs.files(index, count, Path(self.source).expanduser(), work)
        ready, left_out = prepared(names, sources, work, self, say)
        ready, refused = accepted(ready, sources["pixels"], index.shape, say)
        runs, failed = rounds(ready, self.seconds, self.rounds, say)
        peers: Tree = {}
        for name, folder in ((name, folder) for name, (_, folder) in ready.items() if name not in failed):
            disk = sum(path.stat().st_size for path in files_below(folder))
            peers[name] = {"disk_bytes": disk, "packages": PEERS[name].packages, "workers": {}}
            for workers in PEERS[name].workers:
                peers[name]["workers"][str(workers)] = summary(runs[name, workers])
        raw = count * int(torch.tensor(index.shape).prod())
        return {
            "dataset": index.name,
            "images": count,
            "raw_bytes": raw,
            "batch": BATCH,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "peers": peers,
            "left_out": left_out | refused | failed,
            "bars": bars(peers, peers["ours"]["disk_bytes"], raw),
        }


@contextmanager
def work_folder(given: str, name: str) -> Any:
    if given:
        yield Path(given).expanduser() / name
        return
    folder = Path(tempfile.mkdtemp(prefix="ali_dist-bench-"))
    try:
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepared(
    names: list[str], sources: Mapping[str, Path], work: Path, flags: Flags, say: Say
) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """Python and folder of each peer that can be had, its format written; and why the others can't."""
    ready, left_out = {}, {}
    cache = Path(flags.cache).expanduser().absolute()
    for name in names:
        peer = PEERS[name]
        try:
            if peer.reads not in sources:
                raise Failed("it reads JPEG files: give the official archive as --source")
            python, folder = environment(peer.packages, cache, flags.install, say), sources[peer.reads]
            if peer.convert:
                say(f"{name}: writing its format")

                def convert(out: Path, name: str = name, python: Path = python, source: Path = folder) -> None:
                    run(python, CONVERT, do="convert", peer=name, source=str(source), folder=str(out))

                folder = inputs.once(work / peer.convert.__name__, convert)
            ready[name] = python, folder
        except Failed as error:
            left_out[name] = str(error)
            say(f"{name} is left out: {error}")
    return ready, left_out


def accepted(
    ready: dict[str, tuple[Path, Path]], pixels: Path, shape: tuple[int, ...], say: Say
) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """The peers whose epoch is every image with its label exactly once; and why others are refused.

    RuntimeError when ours is refused.
    """
    expected = contents(Memmap(pixels, 0, random=False), shape)
    good, refused = {}, {}
    for name, (python, folder) in ready.items():
        say(f"{name}: checking what it delivers")
        try:
            found = run(python, CHECK, do="check", peer=name, folder=str(folder), shape=shape)
            for key, value in expected.items():
                if found[key] != value:
                    raise Failed(f"it delivers other images: {key} {str(found[key])[:60]} instead of {str(value)[:60]}")
            good[name] = python, folder
        except Failed as error:
            refused[name] = str(error)
            say(f"{name} is refused: {error}")
    if "ours" in refused:
        raise RuntimeError(f"our stream: {refused['ours']}")
    return good, refused


def rounds(
    ready: dict[str, tuple[Path, Path]], seconds: float, count: int, say: Say
) -> tuple[dict[tuple[str, int], Tree], dict[str, str]]:
    """Measurements of each peer and number of workers, warm in each round and cold in the first; and why some peers
    have none. RuntimeError when ours has none.
    """
    ways = [(name, workers) for name in ready for workers in PEERS[name].workers]
    runs: dict[tuple[str, int], Tree] = {way: {"warm": [], "cold": []} for way in ways}
    failed: dict[str, str] = {}
    for number in range(count):
        states = ("warm",) if number else ("cold", "warm")
        say(f"round {number + 1} of {count}: {len(ways)} ways, page cache {' and '.join(states)}")
        for (name, workers), state in itertools.product(ways, states):
            if name in failed:
                continue
            try:
                runs[name, workers][state].append(timed(name, *ready[name], workers, seconds, state))
            except Failed as error:
                failed[name] = str(error)
                say(f"{name} has failed: {error}")
    if "ours" in failed:
        raise RuntimeError(f"our stream: {failed['ours']}")
    return runs, failed


def timed(name: str, python: Path, folder: Path, workers: int, seconds: float, state: str) -> Tree:
    """One measurement, and the share of the files' pages that were in the page cache before it."""
    files = files_below(folder)
    (drop if state == "cold" else warm)(files)
    cached = cached_share(files)
    task = {"do": "measure", "peer": name, "folder": str(folder), "workers": workers, "seconds": seconds}
    return run(python, MEASURE + 4 * seconds, steady=state == "warm", **task) | {"cached": cached}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(runs: Tree) -> Tree:
    """Medians and extremes over the rounds: `first` (warm, from the first batch on), `steady` (warm, after that;
    `later_epochs`: the first epoch was over by then), `cold` (like `first`), seconds to the first batch, and memory.
    """

    def rates(runs: list[Tree], key: str) -> Tree:
        spans = [run[key] for run in runs]
        return {
            "images_per_s": spread([span["images"] / span["seconds"] for span in spans]),
            "per_core": spread([span["images"] / max(span["cpu_seconds"], TICK) for span in spans]),
            "others": spread([span["others"] for span in spans]),
        }

    warm, cold = runs["warm"], runs["cold"]
    return {
        "steady": rates(warm, "steady") | {"later_epochs": all(run["first"]["ended"] for run in warm)},
        "first": rates(warm, "first"),
        "cold": rates(cold, "first") | {"cached": max(run["cached"] for run in cold)},
        "first_batch_s": spread([run["first_batch_s"] for run in warm]),
        "first_batch_cold_s": spread([run["first_batch_s"] for run in cold]),
        "memory": spread([run["memory"] for run in warm]),
    }


def lines(result: Tree) -> list[str]:
    """The result as text."""

    def rate(row: Tree) -> str:
        wall, core = row["images_per_s"], row["per_core"]
        return f"{wall['median']:>9,.0f} [{wall['low']:,.0f}, {wall['high']:,.0f}] {core['median']:>9,.0f} a core"

    out = [
        f"{result['dataset']}, {result['images']:,} images; images/s [least, most] and images per CPU second: "
        "page cache warm, later epochs (*: still the first) | warm, first epoch | cold, first epoch"
    ]
    for name, peer in result["peers"].items():
        for workers, row in peer["workers"].items():
            steady = rate(row["steady"]) + ("" if row["steady"]["later_epochs"] else "*")
            cold = rate(row["cold"]) + (" (STILL CACHED)" if row["cold"]["cached"] > STILL_CACHED else "")
            out.append(
                f"{name:<16} {workers} workers {steady} | {rate(row['first'])} | {cold} | first batch "
                f"{row['first_batch_s']['median']:.2f} s, {row['memory']['high'] / 1e6:,.0f} MB beyond PyTorch, "
                f"{peer['disk_bytes'] / 1e6:,.0f} MB on disk; others used {row['steady']['others']['median']:.2f} cores"
            )
    out += [f"{name:<16} no numbers: {why}" for name, why in result["left_out"].items()]
    for bar in result["bars"]:
        found = "not measured"
        if bar["measured"] is not None:
            found = f"{bar['measured']:>10,.4g}{bar['unit']}  {'met' if bar['met'] else 'not met'}"
        out.append(f"{bar['name']:<70} {'<=' if bar['at_most'] else '>='} {bar['bar']:,g}{bar['unit']:<2} {found}")
    return out
