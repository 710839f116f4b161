"""python -m kernels.bench [op ...] [--json]: the kernels' speed beside that of their peers, or on a CPU their counts.

An op whose quick correctness check fails gets no figures. On a CUDA device each op is timed, forward and backward, at
the layers of the networks, against eager PyTorch, torch.compile (both launched one by one and as CUDA graphs) and the
rivals in its row; the copy bandwidth of the same run is the measure. Without a device the bytes and launches of a call
are printed beside the peers', and nothing is timed. Exit code 0, 1 when an op is wrong, 2 for bad arguments.
"""

import argparse
import difflib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
import triton

from kernels.dispatch import INTERPRET
from kernels.gate import gate
from kernels.ops import OPS, Cost, Op
from kernels.timing import Time, copy_bandwidth, time_case

BATCHES = (128, 512, 2048)
NOT_TIMED = "No CUDA device: nothing was timed. Bytes and launches are counted from the kernels, not measured."


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.partition("\n\n")[2])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="images a batch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    given = parser.parse_args(argv)
    for name in given.ops:
        if name not in OPS:
            near = difflib.get_close_matches(name, OPS, 1)
            parser.error(f"no op {name!r}" + (f": did you mean {near[0]!r}?" if near else f": one of {', '.join(OPS)}"))
    if min(given.batch) < 1:
        parser.error("--batch must be positive")
    return given


def cases(op: Op, batches: list[int], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """What is to be shown of an op: a row for each layer, batch, option and direction, with the counts of all."""
    for layer, shape in op.shapes.items():
        for batch in batches if op.batched else [None]:
            size = shape if batch is None else (shape[0] * batch // 128, *shape[1:])
            for option, options in op.options.items():
                counts = {"ours": op.cost} | op.peers
                costs = {name: cost(size, dtype, **options) for name, cost in counts.items()}
                for direction in ("forward", "backward"):
                    if getattr(costs["ours"], f"{direction}_launches"):
                        yield {
                            "op": op.name,
                            "layer": layer,
                            "batch": batch,
                            "shape": list(size),
                            "option": option,
                            "dtype": str(dtype).removeprefix("torch."),
                            "direction": direction,
                            "counts": {name: count(cost, direction) for name, cost in costs.items()},
                        }


def count(cost: Cost, direction: str) -> dict[str, int]:
    return {name: getattr(cost, f"{direction}_{name}") for name in ("bytes", "launches")}


def with_times(row: dict[str, Any], copy: float) -> dict[str, Any]:
    """The row with the times of all in seconds, and the kernels' bytes a second, as such and as a share of `copy`."""
    op, dtype = OPS[row["op"]], getattr(torch, row["dtype"])
    times = time_case(op, tuple(row["shape"]), dtype, op.options[row["option"]], row["direction"] == "backward")
    named = {
        name: {way: asdict(time) if isinstance(time, Time) else time for way, time in both.items()}
        for name, both in times.items()
    }
    ours = times["ours"]["graph"]
    if not isinstance(ours, Time):
        return row | {"times": named}
    speed = row["counts"]["ours"]["bytes"] / ours.median
    ratios = {
        name: {way: time.median / times["ours"][way].median for way, time in both.items() if isinstance(time, Time)}
        for name, both in times.items()
        if name != "ours" and isinstance(times["ours"]["launched"], Time)
    }
    return row | {"times": named, "ratios": ratios, "bytes_per_second": speed, "share_of_copy": speed / copy}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    batch = "" if row["batch"] is None else f" x{row['batch']}"
    text = f"{row['op']:<24} {row['layer'] + batch:<22} {row['option']:<8} {row['direction']:<9}"
    counts = row["counts"]
    mine = counts["ours"]
    if "times" not in row:
        text += f"{mine['bytes'] / 1e6:>10.2f} MB {mine['launches']:>3} launches"
        for name, theirs in counts.items():
            if name != "ours":
                text += f" | {name} {theirs['bytes'] / mine['bytes']:.2f}x bytes, {theirs['launches']} launches"
        return text
    graph = row["times"]["ours"]["graph"]
    if isinstance(graph, str):
        return text + f" failed: {graph}"
    low, median, high = (graph[name] * 1e6 for name in ("low", "median", "high"))
    text += f"{median:>9.1f} us [{low:.1f}, {high:.1f}] {row['bytes_per_second'] / 1e12:.2f} TB/s"
    text += f" {row['share_of_copy']:.0%} of copy"
    for name, both in row["times"].items():
        if name != "ours":
            found = row["ratios"].get(name, {})
            text += f" | {name} " + ", ".join(
                f"{way} {found[way]:.2f}x" if way in found else f"{way} failed: {time}" for way, time in both.items()
            )
    return text


def about(argv: list[str]) -> dict[str, Any]:
    """When, with what and where: the head of every result."""
    cuda = torch.cuda.is_available()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if cuda:
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "kernels.bench", *argv]),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "versions": versions,
        "timed": cuda,
    }


def main(argv: list[str]) -> int:
    given = arguments(argv)
    result = about(argv)
    device = "cuda" if result["timed"] else "cpu"
    copy = copy_bandwidth() if result["timed"] else None
    result |= {"copy_bytes_per_second": copy, "red": {}, "rows": []}
    say = (lambda text: None) if given.json else (lambda text: print(text, flush=True))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    say(f"{result['date']}  {result['device']}  {versions}\n{result['command']}")
    say(
        NOT_TIMED if copy is None else f"copy: {copy / 1e12:.2f} TB/s. Times are of graph replays; ratios: peer / ours."
    )
    for name in given.ops or OPS:
        op = OPS[name]
        if wrong := gate(op, device):
            result["red"][name] = wrong
            say(f"{name:<24} RED, no figures: {wrong}")
            continue
        dtype = getattr(torch, given.dtype)
        for row in cases(op, given.batch, dtype if dtype in op.dtypes else op.dtypes[0]):
            result["rows"].append(row if copy is None else with_times(row, copy))
            say(line(result["rows"][-1]))
    if given.json:
        print(json.dumps(result | ({} if copy else {"note": NOT_TIMED}), indent=1))
    return 1 if result["red"] else 0


if __name__ == "__main__":
    if not torch.cuda.is_available() and not INTERPRET:
        # The correctness check needs the interpreter, which must be on before triton is imported.
        command = [sys.executable, "-m", "kernels.bench", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    sys.exit(main(sys.argv[1:]))
