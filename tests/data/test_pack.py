import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import NUMBERED, Numbered, numbers, prepare

from ali_dist.data.index import load_index
from ali_dist.data.pack import PERMUTATION_SEED, check_counts, fingerprint, new_folder, pack
from ali_dist.data.shards import verify
from ali_dist.data.stream import validation
from ali_dist.recipe import UserError


def stored(index, split):
    batches = list(validation(index, split, count=10**6, batch_size=1000))
    return torch.cat([batch.x for batch in batches]).numpy(), torch.cat([batch.y for batch in batches]).numpy()


def test_every_sample_comes_back_exactly(index):
    order = {"train": np.random.default_rng(PERMUTATION_SEED).permutation(5003), "valid": np.arange(301)}
    for split, rows in order.items():
        x, y = stored(index, split)
        samples = Numbered(len(rows))
        assert (numbers(x) == rows).all() and (y == rows % 10).all()
        assert all((x[at] == samples[i][0]).all() for at, i in enumerate(rows.tolist()))
    assert [shard.images for shard in index.shards("train")] == [2048, 2048, 907]
    assert index.classes == tuple("abcdefghij") and index.shape == (3, 4, 4)


@pytest.mark.parametrize("n", [5003, 37])
def test_mean_image_is_over_the_first_training_images(tmp_path, n):
    index = prepare(tmp_path, train=n)
    x, _ = stored(index, "train")
    assert index.mean_image.dtype == torch.float64
    assert np.allclose(index.mean_image.numpy(), x[:500].mean(0) / 255, rtol=0, atol=1e-15)


def test_two_runs_write_the_same_bytes(tmp_path):
    one, other = (prepare(tmp_path / name).folder for name in ("one", "other"))
    files = sorted(path.name for path in one.iterdir())
    assert files == ["index.json", *(f"train-{i:06d}.tar" for i in range(3)), "valid-000000.tar"]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    for rows in json.loads((one / "index.json").read_text())["splits"].values():
        for shard in rows["shards"]:
            fresh = fingerprint(one / shard["name"])
            assert (fresh["sha256"], fresh["bytes"]) == (shard["sha256"], shard["bytes"])


def test_progress_is_in_images(tmp_path):
    spec, seen = replace(NUMBERED, counts={"train": 300, "valid": 10}), []
    with new_folder(tmp_path, spec.name) as folder:
        pack(spec, spec.open(None, spec.counts), None, folder, lambda *at: seen.append(at))
    assert seen == [(256, 310), (300, 310), (310, 310)]


def test_a_wrong_count_is_an_error(tmp_path):
    with pytest.raises(UserError, match="a.zip has 300 train images instead of 301: .*fetch it again"):
        opened = NUMBERED.open(None, {"train": 300})
        check_counts(replace(NUMBERED, counts={"train": 301}), opened, "a.zip")


def test_an_error_leaves_nothing_and_keeps_the_old(tmp_path):
    old = prepare(tmp_path, train=10)
    with pytest.raises(KeyError):
        with new_folder(tmp_path, "numbered") as folder:
            (folder / "train-000000.tar").write_bytes(b"half")
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["numbered"]
    verify(old)
    assert prepare(tmp_path, train=20).images("train") == 20
    assert [path.name for path in tmp_path.iterdir()] == ["numbered"]


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "numbered").mkdir()
    (tmp_path / "numbered" / "thesis.txt").write_text("only copy")
    with pytest.raises(UserError, match="numbered is there but is no prepared data set"):
        prepare(tmp_path)
    assert (tmp_path / "numbered" / "thesis.txt").read_text() == "only copy"


KILLED = """
import sys, time
from dataclasses import replace
from pathlib import Path
from numbered import NUMBERED
from ali_dist.data.pack import new_folder, pack

def progress(done, total):
    if done >= 2560:
        print("half way", flush=True)
        time.sleep(60)

with new_folder(Path(sys.argv[1]), "numbered") as folder:
    pack(NUMBERED, NUMBERED.open(None, NUMBERED.counts), None, folder, progress)
"""


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    )
    try:
        assert process.stdout.readline() == b"half way\n"
    finally:
        process.kill()
        process.communicate()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".numbered.partial-") and list(leftover.glob("*.tar"))
    with pytest.raises(UserError, match="no data set 'numbered'"):
        load_index(tmp_path, "numbered")
    verify(prepare(tmp_path, train=300))
    assert [path.name for path in tmp_path.iterdir()] == ["numbered"]


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    prefix = f".numbered.partial-{platform.node()}-"
    ours, parent = tmp_path / f"{prefix}{os.getpid()}", tmp_path / f"{prefix}{os.getppid()}"
    for folder in (ours, parent, tmp_path / f"{prefix}{os.getpid()}-old"):
        (folder / "sub").mkdir(parents=True)
    verify(prepare(tmp_path, train=300))
    assert sorted(path.name for path in tmp_path.iterdir()) == [parent.name, "numbered"]


def test_fingerprint_of_a_folder(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "b").write_text("bb")
        (tmp_path / name / "a").write_text("a")
    one, other = fingerprint(tmp_path / "one"), fingerprint(tmp_path / "other")
    assert one["bytes"] == 3 and one["sha256"] == other["sha256"]
    (tmp_path / "other" / "sub" / "b").write_text("bc")
    assert fingerprint(tmp_path / "other")["sha256"] != one["sha256"]
