"""python -m ali_dist.status RUN: how a run is doing, from its folder alone."""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ali_dist import checkpoint, cli, remote
from ali_dist.run import RunFolder, count_restarts, last_sign, read_lines, skipped_batches

SECONDS_TO_START = 1800  # Ray, PyTorch, checksums of the first shards, compilation: all before the first tick
SECONDS_OF_PATIENCE = 300
GAPS_OF_PATIENCE = 5


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How a run is doing, from its folder alone, so also from another machine that sees it.

    Exit code 0: running, stopped or finished; 1: failed, or stale (it should be running, but gives no sign of life);
    2: there is no such run.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Folder or address of a run, or its name below --storage."""
    storage: str = "runs"
    """Folder or address of runs."""
    json: bool = False
    """Print JSON instead of text."""


def status(run: RunFolder, now: float) -> dict[str, Any]:
    """The run as JSON-ready values; times in seconds, `now` in Unix time. UserError when its recipe is damaged."""
    total = run.read_recipe().schedule.num_images
    events, ticks = read_lines(run.events), read_lines(run.ticks)
    starts = [line for line in events if line.get("event") == "start"]
    begin = starts[-1]["time"] if starts else 0
    since = [tick for tick in ticks if tick["time"] >= begin]
    training = [tick for tick in ticks if tick.get("speed/images_per_s")]
    progress = [line for line in events + ticks if line.get("event") != "uploaded"]  # long after its images were seen
    newest = max(progress, key=lambda line: line["time"], default={"num_images": 0, "time": 0})
    silent = max(0.0, now - last_sign(run, events + ticks))
    marks = [line["event"] for line in events if line.get("event") in ("start", "rollback", "end")]
    ended = marks[-1:] == ["end"]
    state, why = "running", None
    if run.failed.exists():
        state, why = "failed", run.failed.read_text(errors="replace")
    elif ended:
        state = "finished" if newest["num_images"] >= total else "stopped"
    elif silent > patience(starts[-1:] + since):
        state, why = "stale", f"no sign of life for {duration(silent)}: is its process, job or machine still there?"
    elif run.stop.exists():
        why = "stopping: it was asked to save and end"
    last = training[-1] if training else {}
    return {
        "run": str(run),
        "state": state,
        "why": why,
        "seconds_since_sign_of_life": silent,
        "num_images": newest["num_images"],
        "total_images": total,
        "eta_seconds": eta([tick for tick in training if tick in since], total) if state == "running" else None,
        "workers": starts[-1].get("workers") if starts else None,
        "losses": {name: value for name, value in last.items() if name.startswith("loss/") and value is not None},
        "images_per_s": last.get("speed/images_per_s"),
        "data_wait_share": last.get("speed/data_wait_share"),
        "starts": len(starts),
        "restarts": count_restarts(events),
        "skipped_batches": len(skipped_batches(events)),
        "checkpoint": last_checkpoint(run, events, now),
    }


def patience(lines: list[dict[str, Any]]) -> float:
    """Seconds of silence after which a run with these lines, its last start and the ticks since, is stale."""
    gaps = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(lines[-20:])]
    return max(SECONDS_OF_PATIENCE, GAPS_OF_PATIENCE * max(gaps)) if gaps else SECONDS_TO_START


def eta(ticks: list[dict[str, Any]], total: int) -> float | None:
    """Seconds to the end at the pace of the last training ticks, with the time that saving and validation took."""
    if not ticks:
        return None
    first, last = ticks[-20:][0], ticks[-1]
    images, left = last["num_images"] - first["num_images"], max(0, total - last["num_images"])
    return left * (last["time"] - first["time"]) / images if images > 0 else left / last["speed/images_per_s"]


def last_checkpoint(run: RunFolder, events: list[dict[str, Any]], now: float) -> dict[str, Any] | None:
    """The newest checkpoint, and whether it is all that its manifest says."""
    saves = run.saved()
    if not saves:
        return None
    path, problem = saves[-1], None
    manifest = path / "manifest.json"
    try:
        remote.verify(run, path)
    except (checkpoint.Damaged, OSError) as error:
        problem = str(error)
    seconds = [line.get("seconds") for line in events if line.get("event") == "save"]
    return {
        "path": run.shown(path),
        "num_images": int(path.name),
        "age_seconds": max(0.0, now - (manifest if manifest.exists() else path).stat().st_mtime),
        "save_seconds": seconds[-1] if seconds else None,
        "whole": problem is None,
        "problem": problem,
    }


def duration(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def as_text(tree: dict[str, Any]) -> str:
    share = 100 * tree["num_images"] / tree["total_images"]
    left = f", {duration(tree['eta_seconds'])} left" if tree["eta_seconds"] is not None else ""
    lines = [
        f"run         {tree['run']}",
        f"state       {tree['state']}" + (f": {tree['why']}" if tree["why"] else ""),
        f"sign        {duration(tree['seconds_since_sign_of_life'])} ago",
        f"progress    {tree['num_images']:,} / {tree['total_images']:,} images  {share:.1f} %{left}",
    ]
    if tree["losses"]:
        losses = "  ".join(f"{name} {value:.3f}" for name, value in tree["losses"].items())
        lines.append(f"losses      {losses}")
    if tree["images_per_s"] is not None:
        wait = f"{100 * tree['data_wait_share']:.1f} % of the time waiting for data"
        lines.append(f"speed       {tree['images_per_s']:,.0f} images/s with {tree['workers']} workers, {wait}")
    skipped = f", {tree['skipped_batches']} batches skipped after a NaN" if tree["skipped_batches"] else ""
    lines.append(f"restarts    {tree['restarts']} (started {tree['starts']} times){skipped}")
    saved = tree["checkpoint"]
    if saved:
        health = "whole" if saved["whole"] else f"NOT WHOLE: {saved['problem']}"
        lines.append(f"checkpoint  {saved['path']}, {duration(saved['age_seconds'])} old, {health}")
    else:
        lines.append("checkpoint  none yet")
    return "\n".join(lines)


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.status")
    tree = status(remote.find(flags.run, flags.storage), time.time())
    print(json.dumps(tree, indent=2) if flags.json else as_text(tree))
    sys.exit(1 if tree["state"] in ("failed", "stale") else 0)


if __name__ == "__main__":
    cli.run(main)
