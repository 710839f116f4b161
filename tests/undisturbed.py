"""What the job of the benches trains when nothing happens to it, to be held against a run that suffered."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from support import Ranks

from ali_dist import worker
from ali_dist.bench.job import BATCH
from ali_dist.recipe import Job
from ali_dist.recipes import RECIPES
from ali_dist.run import RunFolder, read_lines


def train_undisturbed(rank: int, data: Path, storage: Path, num_images: int) -> int:
    recipe = RECIPES["digits"]
    seldom = {"sample_images": 10**9, "validate_images": 10**9, "save_images": 10**9}
    schedule = replace(recipe.schedule, num_images=num_images, tick_images=4 * BATCH, **seldom)
    job = Job(name="run", data=str(data), storage=str(storage), num_workers=2)
    worker.train_rank(replace(recipe, schedule=schedule), job, gpu=False)
    return rank


def newest(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.saved()[-1].glob("*.safetensors")}


def numbers(run: RunFolder) -> list[tuple]:
    lines = [json.loads(line) for line in run.ticks.read_text().splitlines()]
    return [(line["num_images"], line["loss/d"], line["loss/g"]) for line in lines if "loss/d" in line]


def whole_ticks(run: RunFolder) -> set[tuple]:
    """Those about all updates since the tick before: a run that is stopped, or regroups, writes one about fewer."""
    lines = numbers(run)
    return {line for (before, *_), line in pairwise([(0,), *lines]) if line[0] - before == 4 * BATCH}


def assert_undisturbed(run: RunFolder, ranks: Ranks, data: Path, folder: Path) -> None:
    """The run's last checkpoint and all its whole ticks are those of one that nothing happened to."""
    num_images = int(run.saved()[-1].name)
    ranks.run(2, train_undisturbed, data, folder / "undisturbed", num_images)
    undisturbed = RunFolder(folder / "undisturbed" / "run")
    assert newest(run) == newest(undisturbed)
    ends = [line for line in read_lines(run.events) if line["event"] == "end"]
    assert len(whole_ticks(undisturbed)) == num_images // (4 * BATCH) > 0
    assert len(whole_ticks(undisturbed) - whole_ticks(run)) <= max(0, len(ends) - 1)
